// LayerNorm and Mish of a row that is about to be rounded to 8 bits.
//
// It need not be computed to 24: the exponential comes from a polynomial of degree 4 and a reciprocal from the processor's estimate,
// together right to 2^-13. That takes two thirds of the time.

#pragma once

#include "rows.h"

// Together, as every processor has them that has the first.
#if defined(__AVX512VNNI__) && defined(__AVX512DQ__)
#define SPECMPC_VNNI
#endif

#ifdef SPECMPC_VNNI
#include <immintrin.h>
#endif

namespace specmpc {

struct RoughRow {
  float* values;
};

#ifdef SPECMPC_VNNI
// mish, as in rows.h. exp(x) is 2^t, with 2^(t - ⌊t⌋) by a minimax polynomial; beyond 2^30 Mish is the identity.
inline __m512 rough_mish(__m512 x) {
  const __m512 two = _mm512_set1_ps(2.0f);
  const __m512 t = _mm512_min_ps(_mm512_set1_ps(30.0f), x * _mm512_set1_ps(1.44269504f));  // in this order what is not a number stays so
  const __m512 r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.353417e-2f);
  p = p * r + _mm512_set1_ps(5.201146e-2f);
  p = p * r + _mm512_set1_ps(2.4144276e-1f);
  p = p * r + _mm512_set1_ps(6.9300383e-1f);
  p = p * r + _mm512_set1_ps(1.0000026f);
  const __m512 e = _mm512_scalef_ps(p, t), n = e * (e + two);
  return x * (n * _mm512_rcp14_ps(n + two));
}
#endif

// y ≈ mish(LayerNorm(x + shift)) of one row.
inline void norm_mish_row(const float* x, const float* shift, const float* weight, const float* bias, int64_t dim, RoughRow y) {
#ifdef SPECMPC_VNNI
  constexpr int64_t kLanes = 16;
  const Moments found = moments(x, shift, dim);
  const __m512 mean = _mm512_set1_ps(found.mean), scale = _mm512_set1_ps(found.inverse_std);
  const auto feature = [mean, scale](__m512 sum, __m512 c, __m512 w, __m512 b) { return rough_mish((sum + c - mean) * (scale * w) + b); };
  int64_t j = 0;
  for (; j + kLanes <= dim; j += kLanes) {
    const auto all = [j](const float* of) { return _mm512_loadu_ps(of + j); };
    _mm512_storeu_ps(y.values + j, feature(all(x), all(shift), all(weight), all(bias)));
  }
  if (j < dim) {
    const __mmask16 rest = (1u << (dim - j)) - 1;
    const auto some = [j, rest](const float* of) { return _mm512_maskz_loadu_ps(rest, of + j); };
    _mm512_mask_storeu_ps(y.values + j, rest, feature(some(x), some(shift), some(weight), some(bias)));
  }
#else
  norm_mish_row(x, shift, weight, bias, dim, y.values);
#endif
}

}  // namespace specmpc
