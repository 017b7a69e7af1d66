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

// What LayerNorm does to a row of `dim` sums before its activation: (sums + shift) · factors, normed, · weight + bias.
struct Norm {
  const float *shift, *factors, *weight, *bias;  // without factors these are 1
  int64_t dim;
};

// x, the sums, ← (x + shift) · factors, and what LayerNorm needs of it.
template <typename Feature>
Moments shifted_row(float* x, const Norm& norm) {
  const float *shift = norm.shift, *factors = norm.factors;
  if (!factors) return shifted(x, shift, norm.dim);
#pragma omp simd
  for (int64_t j = 0; j < norm.dim; ++j) x[j] = (x[j] + shift[j]) * factors[j];
  return moments(norm.dim, [x](int64_t j) { return x[j]; });
}

// x ← what is normed, before weight and bias.
inline void normalise_row(float* x, const Moments& found, int64_t dim) {
  const float mean = found.mean, inverse_std = found.inverse_std;
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) x[j] = (x[j] - mean) * inverse_std;
}

// y = mish(normed · weight + bias); x is overwritten; what is normed is kept, if so wanted.
template <typename Feature, typename To>
void mish_row(float* x, const Moments& found, const Norm& norm, Feature* normed, To* y) {
  normalise_row(x, found, norm.dim);
  if (normed) convert(x, norm.dim, normed);
  const float *weight = norm.weight, *bias = norm.bias;
#pragma omp simd
  for (int64_t j = 0; j < norm.dim; ++j) x[j] = mish(x[j] * weight[j] + bias[j]);
  convert(x, norm.dim, y);
}

// From the gradient g of f(normed · weight + bias), of which `slope` is f's, → that of the sums; g is overwritten.
template <typename Feature, typename Slope>
void denormalise_row(
    float* g, const Feature* normed, float inverse_std, const Norm& norm, const RowSums& sums, Feature* gradient, Slope slope) {
  const int64_t dim = norm.dim;
  const float *weight = norm.weight, *bias = norm.bias, *factors = norm.factors;
  float *of_shift = sums.shift, *of_weight = sums.weight, *of_bias = sums.bias;
  float along_one = 0.0f, along_normed = 0.0f;
#pragma omp simd reduction(+ : along_one, along_normed)
  for (int64_t j = 0; j < dim; ++j) {
    const float x = to_float(normed[j]), got = g[j] * slope(x * weight[j] + bias[j]);
    of_weight[j] += got * x;
    of_bias[j] += got;
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
  for (int64_t j = 0; j < dim; ++j) of_shift[j] += g[j];
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
template <>
inline Moments shifted_row<at::BFloat16>(float* x, const Norm& norm) {
  return rough_shifted(x, norm.shift, norm.factors, norm.dim);
}
template <typename To>
void mish_row(float* x, const Moments& found, const Norm& norm, at::BFloat16* normed, To* y) {
  rough_mish_row(x, found, norm.weight, norm.bias, norm.dim, y, [normed](__m512 value, __m512, __mmask16 lanes, int64_t j) {
    if (normed) store(value, lanes, normed + j);
  });
}
inline void denormalise_row(
    float* g,
    const at::BFloat16* normed,
    float inverse_std,
    const Norm& norm,
    const RowSums& sums,
    at::BFloat16* gradient,
    MishSlope) {
  __m512 along_one = {}, along_normed = {};
  for_vectors(norm.dim, [&](int64_t j, __mmask16 lanes) {
    const __m512 x = load(normed + j, lanes), w = load(norm.weight + j, lanes);
    const __m512 got = load(g + j, lanes) * rough_mish_slope(x * w + load(norm.bias + j, lanes)), grown = got * w;
    store(load(sums.weight + j, lanes) + got * x, lanes, sums.weight + j);
    store(load(sums.bias + j, lanes) + got, lanes, sums.bias + j);
    store(grown, lanes, g + j);
    along_one += grown;
    along_normed += grown * x;
  });
  const __m512 scale = _mm512_set1_ps(inverse_std);
  const __m512 one = _mm512_set1_ps(_mm512_reduce_add_ps(along_one) / norm.dim);
  const __m512 slope = _mm512_set1_ps(_mm512_reduce_add_ps(along_normed) / norm.dim);
  for_vectors(norm.dim, [&](int64_t j, __mmask16 lanes) {
    __m512 value = scale * (load(g + j, lanes) - one - load(normed + j, lanes) * slope);
    if (norm.factors) value *= load(norm.factors + j, lanes);
    store(load(sums.shift + j, lanes) + value, lanes, sums.shift + j);
    store(value, lanes, gradient + j);
  });
}

#endif

}  // namespace specmpc
