// What lies between two products of a layer that learns, row by row: LayerNorm and Mish, or a softmax, and their gradients.
//
// What is rounded to bf16 afterwards need not be computed to 24 bits: where the processor has AVX-512, rough_rows.h's Mish serves there.

#pragma once

#include "rough_rows.h"

namespace specmpc {

// What a row is added to: the gradients of a layer's bias and of LayerNorm's weight and bias.
struct RowSums {
  float *shift, *weight, *bias;
};

// x → (x + shift) · factors, if there are any, less its mean and divided by its standard deviation; → the latter's inverse.
inline float normalise_row(float* x, const float* shift, const float* factors, int64_t dim) {
  if (factors) {
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) x[j] = (x[j] + shift[j]) * factors[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) x[j] += shift[j];
  }
  const Moments found = moments(dim, [x](int64_t j) { return x[j]; });
  const float mean = found.mean, inverse_std = found.inverse_std;
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) x[j] = (x[j] - mean) * inverse_std;
  return inverse_std;
}

// y = mish(normed · weight + bias), where normed is what normalise_row makes of x, whose result this is, too; x is overwritten.
template <typename Feature, typename To>
float norm_mish_row(
    float* x, const float* shift, const float* factors, const float* weight, const float* bias, int64_t dim, Feature* normed, To* y) {
  const float inverse_std = normalise_row(x, shift, factors, dim);
  if (normed) convert(x, dim, normed);
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) x[j] = mish(x[j] * weight[j] + bias[j]);
  convert(x, dim, y);
  return inverse_std;
}

// From the gradient g of f(t), with t = normed · weight + bias and f's slope → that of x in normalise_row, to `gradient`; g is overwritten.
template <typename Feature, typename Slope>
void denormalise_row(
    float* g,
    const Feature* normed,
    float inverse_std,
    const float* weight,
    const float* bias,
    const float* factors,
    int64_t dim,
    RowSums sums,
    Feature* gradient,
    Slope slope) {
  float along_one = 0.0f, along_normed = 0.0f;
#pragma omp simd reduction(+ : along_one, along_normed)
  for (int64_t j = 0; j < dim; ++j) {
    const float x = to_float(normed[j]), got = g[j] * slope(x * weight[j] + bias[j]);
    sums.weight[j] += got * x;
    sums.bias[j] += got;
    g[j] = got * weight[j];
    along_one += g[j];
    along_normed += g[j] * x;
  }
  along_one /= dim;
  along_normed /= dim;
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) g[j] = inverse_std * (g[j] - along_one - to_float(normed[j]) * along_normed);
  if (factors) {
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) g[j] *= factors[j];
  }
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) sums.shift[j] += g[j];
  convert(g, dim, gradient);
}

struct MishSlope {
  SPECMPC_INLINED float operator()(float t) const { return mish_slope(t); }
};
struct NoSlope {  // f(t) = t
  SPECMPC_INLINED float operator()(float) const { return 1.0f; }
};

// From the gradient g of y, softmaxes of groups of `size` → that of what they were given.
inline void softmax_slope_row(float* g, const float* y, int64_t dim, int64_t size) {
  for (int64_t first = 0; first < dim; first += size) {
    float along = 0.0f;
    for (int64_t j = first; j < first + size; ++j) along += g[j] * y[j];
    for (int64_t j = first; j < first + size; ++j) g[j] = y[j] * (g[j] - along);
  }
}

#if defined(__AVX512BF16__) && defined(SPECMPC_VNNI)

// As above, where features are bf16.
template <typename To>
float norm_mish_row(
    float* x,
    const float* shift,
    const float* factors,
    const float* weight,
    const float* bias,
    int64_t dim,
    at::BFloat16* normed,
    To* y) {
  return rough_norm_mish_row(x, shift, factors, weight, bias, dim, y, [normed](__m512 value, __m512, __mmask16 lanes, int64_t j) {
    if (normed) store(value, lanes, normed + j);
  });
}

inline void denormalise_row(
    float* g,
    const at::BFloat16* normed,
    float inverse_std,
    const float* weight,
    const float* bias,
    const float* factors,
    int64_t dim,
    RowSums sums,
    at::BFloat16* gradient,
    MishSlope) {
  __m512 along_one = {}, along_normed = {};
  for_vectors(dim, [&](int64_t j, __mmask16 lanes) {
    const __m512 x = load(normed + j, lanes), w = load(weight + j, lanes);
    const __m512 got = load(g + j, lanes) * rough_mish_slope(x * w + load(bias + j, lanes)), grown = got * w;
    store(load(sums.weight + j, lanes) + got * x, lanes, sums.weight + j);
    store(load(sums.bias + j, lanes) + got, lanes, sums.bias + j);
    store(grown, lanes, g + j);
    along_one += grown;
    along_normed += grown * x;
  });
  const __m512 scale = _mm512_set1_ps(inverse_std);
  const __m512 one = _mm512_set1_ps(_mm512_reduce_add_ps(along_one) / dim);
  const __m512 slope = _mm512_set1_ps(_mm512_reduce_add_ps(along_normed) / dim);
  for_vectors(dim, [&](int64_t j, __mmask16 lanes) {
    __m512 value = scale * (load(g + j, lanes) - one - load(normed + j, lanes) * slope);
    if (factors) value *= load(factors + j, lanes);
    store(load(sums.shift + j, lanes) + value, lanes, sums.shift + j);
    store(value, lanes, gradient + j);
  });
}

#endif

}  // namespace specmpc
