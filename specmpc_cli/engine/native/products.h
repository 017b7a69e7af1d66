// What products of rows with a weight's rows, x·Wᵀ, have in common, a few dozen rows at a time, so that what follows finds them in a near
// cache.
//
// Three ways have one interface: fp32 in vector registers (fp32_product.h), bf16 in AMX's tiles or vector registers (bf16_product.h), and
// 8-bit integers (int8_product.h). Each packs weights into panels of neighbouring outputs, in the order in which they are read. Rows may
// lack leading inputs, whose part of the product is known already. A row's sums do not depend on the rows beside it, on the number of
// threads or on the batch.
//
// The first two, with sums in fp32, also compute products over rows, Σ left[row]ᵀ·right[row], which gradients of weights are.

#pragma once

#include "rough_rows.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cstring>
#include <type_traits>
#include <vector>

namespace specmpc {

// Memory that a thread keeps, from the start of a cache line on. What it held is lost when it grows.
template <typename T>
class Scratch {
 public:
  T* at_least(int64_t size) {
    if (static_cast<int64_t>(held_.size()) < size + static_cast<int64_t>(kLine / sizeof(T))) held_.resize(size + kLine / sizeof(T));
    return held_.data() + (-reinterpret_cast<uintptr_t>(held_.data()) & (kLine - 1)) / sizeof(T);
  }

 private:
  std::vector<T> held_;
};

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// The inputs of one row or output that an instruction multiplies at once: two in bf16, four in 8 bits.
typedef uint32_t FourBytes __attribute__((may_alias));

constexpr int64_t kBlock = 16;  // FourBytes in a vector register

inline void transpose(FourBytes (&block)[kBlock][kBlock]) {
#ifdef __AVX512F__
  __m512i rows[kBlock], pairs[kBlock];
  for (int i = 0; i < kBlock; ++i) rows[i] = _mm512_load_si512(block[i]);
  for (int i = 0; i < kBlock; i += 2) {  // neighbours in each quarter of a register, then neighbours of those
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < kBlock; i += 4) {
    for (int k = 0; k < 2; ++k) {
      rows[i + 2 * k] = _mm512_unpacklo_epi64(pairs[i + k], pairs[i + k + 2]);
      rows[i + 2 * k + 1] = _mm512_unpackhi_epi64(pairs[i + k], pairs[i + k + 2]);
    }
  }
  constexpr int kEven = 0x88, kOdd = 0xdd;  // quarters of both operands
  for (int i = 0; i < 4; ++i) {
    const __m512i even[2] = {_mm512_shuffle_i32x4(rows[i], rows[i + 4], kEven), _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], kEven)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(rows[i], rows[i + 4], kOdd), _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], kOdd)};
    _mm512_store_si512(block[i], _mm512_shuffle_i32x4(even[0], even[1], kEven));
    _mm512_store_si512(block[i + 4], _mm512_shuffle_i32x4(odd[0], odd[1], kEven));
    _mm512_store_si512(block[i + 8], _mm512_shuffle_i32x4(even[0], even[1], kOdd));
    _mm512_store_si512(block[i + 12], _mm512_shuffle_i32x4(odd[0], odd[1], kOdd));
  }
#else
  for (int64_t i = 0; i < kBlock; ++i) {
    for (int64_t j = 0; j < i; ++j) std::swap(block[i][j], block[j][i]);
  }
#endif
}

// What a layer hands on to the next: rows side by side.
template <typename T>
struct PlainFeatures {
  T* rows;

  PlainFeatures(int64_t count, int64_t widest) {
    static thread_local Scratch<T> scratch;
    rows = scratch.at_least(count * widest);
  }
};

// What rounding to 8 bits has to mind, and nobody else.
struct Care {
  int64_t apart = 0;  // so many leading inputs are of another kind than those after them
  bool fine = false;  // inputs that another layer makes must be nearer than 8 bits
};

}  // namespace specmpc
