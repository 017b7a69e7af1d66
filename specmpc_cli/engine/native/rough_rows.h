// LayerNorm and Mish of rows that are about to be rounded, to 8 bits or to bf16.
//
// They need not be computed to 24: the exponential comes from a polynomial of degree 4 and a reciprocal from the processor's estimate,
// together right to 2^-13. And a row is passed over twice only. That takes half of the time.

#pragma once

#include "rows.h"

// Together, as every processor has them that has the first.
#if defined(__AVX512VNNI__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && defined(__AVX512BW__)
#define SPECMPC_VNNI
#endif

#ifdef SPECMPC_VNNI
#include <immintrin.h>
#endif

namespace specmpc {

// The least and the greatest of some values and 0.
struct Spread {
  float low, high;
  bool finite;
};

// That is about to be rounded to 8 bits.
struct RoughRow {
  float* values;
  Spread* spread;  // of these values, to be found
};

#ifdef SPECMPC_VNNI

// exp(x) is 2^t, with 2^(t - ⌊t⌋) by a minimax polynomial; beyond 2^30 it stays there, where Mish is the identity.
SPECMPC_INLINED __m512 rough_exp(__m512 x) {
  const __m512 t = _mm512_min_ps(_mm512_set1_ps(30.0f), x * _mm512_set1_ps(1.44269504f));  // in this order what is not a number stays so
  const __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.353417e-2f);
  p = p * r + _mm512_set1_ps(5.201146e-2f);
  p = p * r + _mm512_set1_ps(2.4144276e-1f);
  p = p * r + _mm512_set1_ps(6.9300383e-1f);
  p = p * r + _mm512_set1_ps(1.0000026f);
  return _mm512_scalef_ps(p, t);
}

// mish and its slope, as in rows.h.
SPECMPC_INLINED __m512 rough_mish(__m512 x) {
  const __m512 two = _mm512_set1_ps(2.0f), e = rough_exp(x), n = e * (e + two);
  return x * (n * _mm512_rcp14_ps(n + two));
}
SPECMPC_INLINED __m512 rough_mish_slope(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0f), two = _mm512_set1_ps(2.0f), four = _mm512_set1_ps(4.0f);
  const __m512 e = rough_exp(x), n = e * (e + two), inverse = _mm512_rcp14_ps(n + two);
  return (n + four * x * e * (e + one) * inverse) * inverse;
}

// Calls for each vector of a row with its first feature and the lanes that it fills.
template <typename Call>
SPECMPC_INLINED void for_vectors(int64_t dim, Call call) {
  constexpr int64_t kLanes = 16;
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) call(j, static_cast<__mmask16>(0xffff));
  if (j < dim) call(j, static_cast<__mmask16>((1u << (dim - j)) - 1));
}
SPECMPC_INLINED __m512 load(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
SPECMPC_INLINED __m512 load(const at::BFloat16* from, __mmask16 lanes) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16);
}
SPECMPC_INLINED void store(__m512 value, __mmask16 lanes, float* to) { _mm512_mask_storeu_ps(to, lanes, value); }
#ifdef __AVX512BF16__
SPECMPC_INLINED void store(__m512 value, __mmask16 lanes, at::BFloat16* to) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(value));
}
#endif

// Finds the spread of vectors.
class Spreading {
 public:
  SPECMPC_INLINED void see(__m512 values) {
    low_ = _mm512_min_ps(values, low_);
    high_ = _mm512_max_ps(values, high_);
    odd_ = _mm512_fmadd_ps(values, _mm512_setzero_ps(), odd_);  // stays zero while all are finite; as a formula it would always
  }
  SPECMPC_INLINED Spread found() const {
    return {_mm512_reduce_min_ps(low_), _mm512_reduce_max_ps(high_), _mm512_reduce_add_ps(odd_) == 0.0f};
  }

 private:
  __m512 low_ = {}, high_ = {}, odd_ = {};
};

inline Spread spread(const float* x, int64_t count) {
  Spreading all;
  for_vectors(count, [&](int64_t j, __mmask16 lanes) { all.see(load(x + j, lanes)); });
  return all.found();
}

// x ← (x + shift) · factors, and what LayerNorm needs of it; without factors these are 1.
SPECMPC_INLINED Moments rough_shifted(float* x, const float* shift, const float* factors, int64_t dim) {
  const float near = (x[0] + shift[0]) * (factors ? factors[0] : 1.0f);  // squares are of distances to it, so that fewer digits cancel
  __m512 sum = {}, squares = {};
  for_vectors(dim, [&](int64_t j, __mmask16 lanes) {
    __m512 value = load(x + j, lanes) + load(shift + j, lanes);
    if (factors) value *= load(factors + j, lanes);
    store(value, lanes, x + j);
    const __m512 distance = _mm512_maskz_sub_ps(lanes, value, _mm512_set1_ps(near));
    sum += distance;
    squares += distance * distance;
  });
  const float rest = _mm512_reduce_add_ps(sum) / dim, variance = std::max(_mm512_reduce_add_ps(squares) / dim - rest * rest, 0.0f);
  return {near + rest, 1.0f / std::sqrt(variance + kEps)};
}
inline Moments rough_shifted(float* x, const float* shift, int64_t dim) { return rough_shifted(x, shift, nullptr, dim); }

// y ≈ mish(normed · weight + bias), where normed is LayerNorm's before its weight and bias. `seen` is called with vectors of normed and
// of y.
template <typename To, typename Seen>
SPECMPC_INLINED void rough_mish_row(
    const float* x, const Moments& found, const float* weight, const float* bias, int64_t dim, To* y, Seen seen) {
  const __m512 scale = _mm512_set1_ps(found.inverse_std), offset = _mm512_set1_ps(-found.mean * found.inverse_std);
  for_vectors(dim, [&](int64_t j, __mmask16 lanes) {
    const __m512 normed = load(x + j, lanes) * scale + offset;
    const __m512 made = rough_mish(normed * load(weight + j, lanes) + load(bias + j, lanes));
    store(made, lanes, y + j);
    seen(normed, made, lanes, j);
  });
}

inline void mish_row(const float* x, const Moments& found, const float* weight, const float* bias, int64_t dim, RoughRow y) {
  Spreading all;
  rough_mish_row(x, found, weight, bias, dim, y.values, [&](__m512, __m512 made, __mmask16 lanes, int64_t) {
    all.see(_mm512_maskz_mov_ps(lanes, made));
  });
  *y.spread = all.found();
}
#ifdef __AVX512BF16__
inline void mish_row(const float* x, const Moments& found, const float* weight, const float* bias, int64_t dim, at::BFloat16* y) {
  rough_mish_row(x, found, weight, bias, dim, y, [](auto...) {});
}
#endif

#else

inline Spread spread(const float* x, int64_t count) {
  constexpr uint32_t kExponent = 0x7f800000;
  float low = 0.0f, high = 0.0f;
  uint32_t odd = 0;
#pragma omp simd reduction(min : low) reduction(max : high) reduction(| : odd)
  for (int64_t k = 0; k < count; ++k) {
    low = x[k] < low ? x[k] : low;  // std::min is not vectorised
    high = x[k] > high ? x[k] : high;
    odd |= (std::bit_cast<uint32_t>(x[k]) & kExponent) == kExponent;
  }
  return {low, high, odd == 0};
}

inline Moments rough_shifted(float* x, const float* shift, int64_t dim) { return shifted(x, shift, dim); }

inline void mish_row(const float* x, const Moments& found, const float* weight, const float* bias, int64_t dim, RoughRow y) {
  mish_row(x, found, weight, bias, dim, y.values);
  *y.spread = spread(y.values, dim);
}

#endif

// x += shift, and what LayerNorm needs of it: roughly, if what is made of it is rounded anyway.
template <bool kRough>
Moments shifted(float* x, const float* shift, int64_t dim) {
  if constexpr (kRough) {
    return rough_shifted(x, shift, dim);
  } else {
    return shifted(x, shift, dim);
  }
}

}  // namespace specmpc
