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

#include <cstring>
#include <type_traits>
#include <vector>

namespace specmpc {

// Memory that a thread keeps, from the start of a cache line on. What it held is lost when it grows.
template <typename T>
class Scratch {
 public:
  T* at_least(int64_t size) {
    constexpr size_t kLine = 64;
    if (static_cast<int64_t>(held_.size()) < size + static_cast<int64_t>(kLine / sizeof(T))) held_.resize(size + kLine / sizeof(T));
    return held_.data() + (-reinterpret_cast<uintptr_t>(held_.data()) & (kLine - 1)) / sizeof(T);
  }

 private:
  std::vector<T> held_;
};

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

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
