// A shift, LayerNorm and Mish in one pass, and their gradient: what is between the matrix products of every TD-MPC2 network.
//
// A row is read once and stays in the first cache. Inductor's kernel for the same expression takes more than twice as long on a CPU: it
// computes the row's standard deviation again for each vector of the row, and calls a library for each exponential.

#pragma once

#include "rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <tuple>
#include <vector>

namespace specmpc {

constexpr int64_t kChunks = 16;  // of rows whose gradients are summed apart: fixed, so that sums do not depend on the number of threads

template <typename T>
void forward_rows(const Rows& in, const Rows& out, const PerGroup& shift, const PerGroup& weight, const PerGroup& bias) {
  const int64_t dim = in.dim;
  at::parallel_for(0, in.groups * in.count, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    for_runs(begin, end, in.count, [&](int64_t group, int64_t first, int64_t some) {
      const float *c = shift.of(group), *w = weight.of(group), *b = bias.of(group);
      const T* x = in.of<T>(group, first);
      T* y = out.of<T>(group, first);
      for (int64_t n = 0; n < some; ++n) norm_mish_row(x + n * in.step, c, w, b, dim, y + n * out.step);
    });
  });
}

// `sums` [chunks, 3, G, D]: the gradients of shift, weight and bias, summed over the rows of each chunk.
template <typename T>
void backward_rows(
    const Rows& grad,
    const Rows& in,
    const Rows& out,
    const PerGroup& shift,
    const PerGroup& weight,
    const PerGroup& bias,
    float* sums) {
  const int64_t dim = in.dim, size = (in.count + kChunks - 1) / kChunks;
  at::parallel_for(0, in.groups * kChunks, kGrain / std::max<int64_t>(1, size * dim) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(2 * dim);
    float *normed = buffer.data(), *grad_normed = normed + dim;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t group = chunk / kChunks, first = (chunk % kChunks) * size;
      const float *c = shift.of(group), *w = weight.of(group), *b = bias.of(group);
      float* gc = sums + (chunk % kChunks * 3 * in.groups + group) * dim;
      float *gw = gc + in.groups * dim, *gb = gw + in.groups * dim;
      const T *x = in.of<T>(group, first), *gy = grad.of<T>(group, first);
      T* gx = out.of<T>(group, first);
      for (int64_t n = first; n < std::min(first + size, in.count); ++n, x += in.step, gy += grad.step, gx += out.step) {
        const Moments found = moments(x, c, dim);
        const float mean = found.mean, inverse_std = found.inverse_std;
        float along_one = 0.0f, along_normed = 0.0f;
#pragma omp simd reduction(+ : along_one, along_normed)
        for (int64_t j = 0; j < dim; ++j) {
          normed[j] = (to_float(x[j]) + c[j] - mean) * inverse_std;
          const float g = to_float(gy[j]) * mish_slope(normed[j] * w[j] + b[j]);
          gw[j] += g * normed[j];
          gb[j] += g;
          grad_normed[j] = g * w[j];
          along_one += grad_normed[j];
          along_normed += grad_normed[j] * normed[j];
        }
        along_one /= dim;
        along_normed /= dim;
#pragma omp simd
        for (int64_t j = 0; j < dim; ++j) {
          const float g = inverse_std * (grad_normed[j] - along_one - normed[j] * along_normed);
          gc[j] += g;
          grad_normed[j] = g;
        }
        convert(grad_normed, dim, gx);
      }
    }
  });
}

inline at::Tensor norm_mish(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& weight, const at::Tensor& bias) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  const Rows in(x), out(y);
  const PerGroup c(shift, in.groups, in.dim), w(weight, in.groups, in.dim), b(bias, in.groups, in.dim);
  for_type_of(in.x, [&](auto typed) { forward_rows<decltype(typed)>(in, out, c, w, b); });
  return y;
}

inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_mish_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& shift, const at::Tensor& weight, const at::Tensor& bias) {
  at::Tensor grad_x = at::empty(x.sizes(), x.options());
  const Rows in(x), out(grad_x), given(grad);
  const PerGroup c(shift, in.groups, in.dim), w(weight, in.groups, in.dim), b(bias, in.groups, in.dim);
  const int64_t size = 3 * in.groups * in.dim;
  std::vector<float> sums(kChunks * size);
  for_type_of(in.x, [&](auto typed) { backward_rows<decltype(typed)>(given, in, out, c, w, b, sums.data()); });
  for (int64_t chunk = 1; chunk < kChunks; ++chunk) {
#pragma omp simd
    for (int64_t j = 0; j < size; ++j) sums[j] += sums[chunk * size + j];
  }
  const auto part = [&](int64_t index, const at::Tensor& like) {
    at::Tensor gradient = at::empty(like.sizes(), weight.options());
    float* to = gradient.mutable_data_ptr<float>();
    const float* from = sums.data() + index * in.groups * in.dim;
    std::copy_n(from, gradient.numel(), to);
    for (int64_t group = 1; like.dim() == 1 && group < in.groups; ++group) {
      for (int64_t j = 0; j < in.dim; ++j) to[j] += from[group * in.dim + j];
    }
    return gradient;
  };
  return {grad_x, part(0, shift), part(1, weight), part(2, bias)};
}

}  // namespace specmpc
