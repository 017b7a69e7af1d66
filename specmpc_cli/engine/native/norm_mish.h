// A shift, dropout, LayerNorm and Mish in one pass, and their gradient: what is between the matrix products of every TD-MPC2 network.
//
// A row is read once and stays in the first cache. Inductor's kernel for the same expression takes more than twice as long on a CPU: it
// computes the row's standard deviation again for each vector of the row, and calls a library for each exponential.

#pragma once

#include "rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <optional>
#include <tuple>
#include <vector>

namespace specmpc {

constexpr int64_t kChunks = 16;  // of rows whose gradients are summed apart: fixed, so that sums do not depend on the number of threads

// Dropout's factors for each feature of rows [G, N, D], of which one row at a time is applied; or none.
class Mask {
 public:
  Mask(const std::optional<at::Tensor>& given, const Rows& rows) {
    if (!given) return;
    rows_.emplace(*given);
    const bool alike = rows_->groups == rows.groups && rows_->count == rows.count && rows_->dim == rows.dim;
    TORCH_CHECK(alike && given->scalar_type() == at::kFloat, "norm_mish: a mask is fp32 and as large as the rows");
  }
  explicit operator bool() const { return rows_.has_value(); }
  const float* of(int64_t group, int64_t row) const { return rows_->of<float>(group, row); }

 private:
  std::optional<Rows> rows_;
};

// y = (x + shift) · mask
template <typename T>
void masked_row(const T* x, const float* shift, const float* mask, int64_t dim, float* y) {
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) y[j] = (to_float(x[j]) + shift[j]) * mask[j];
}

template <typename T>
void forward_rows(const Rows& in, const Rows& out, const PerGroup& shift, const PerGroup& weight, const PerGroup& bias, const Mask& mask) {
  const int64_t dim = in.dim;
  at::parallel_for(0, in.groups * in.count, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    std::vector<float> shifted(mask ? dim : 0), zeros(mask ? dim : 0);
    for_runs(begin, end, in.count, [&](int64_t group, int64_t first, int64_t some) {
      const float *c = shift.of(group), *w = weight.of(group), *b = bias.of(group);
      for (int64_t n = first; n < first + some; ++n) {
        const T* x = in.of<T>(group, n);
        T* y = out.of<T>(group, n);
        if (mask) {
          masked_row(x, c, mask.of(group, n), dim, shifted.data());
          norm_mish_row(shifted.data(), zeros.data(), w, b, dim, y);
        } else {
          norm_mish_row(x, c, w, b, dim, y);
        }
      }
    });
  });
}

// One row: what x + shift gets of the gradient → grad_x, with `normed` as scratch; what weight and bias get is added to gw and gb.
template <typename In, typename T>
void backward_row(
    const In* x,
    const T* gy,
    const float* c,
    const float* w,
    const float* b,
    int64_t dim,
    float* normed,
    float* grad_x,
    float* gw,
    float* gb) {
  const Moments found = moments(x, c, dim);
  const float mean = found.mean, inverse_std = found.inverse_std;
  float along_one = 0.0f, along_normed = 0.0f;
#pragma omp simd reduction(+ : along_one, along_normed)
  for (int64_t j = 0; j < dim; ++j) {
    normed[j] = (to_float(x[j]) + c[j] - mean) * inverse_std;
    const float g = to_float(gy[j]) * mish_slope(normed[j] * w[j] + b[j]);
    gw[j] += g * normed[j];
    gb[j] += g;
    grad_x[j] = g * w[j];
    along_one += grad_x[j];
    along_normed += grad_x[j] * normed[j];
  }
  along_one /= dim;
  along_normed /= dim;
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) grad_x[j] = inverse_std * (grad_x[j] - along_one - normed[j] * along_normed);
}

// `sums` [chunks, 3, G, D]: the gradients of shift, weight and bias, to which those of the rows of each chunk are added.
template <typename T>
void backward_rows(
    const Rows& grad,
    const Rows& in,
    const Rows& out,
    const PerGroup& shift,
    const PerGroup& weight,
    const PerGroup& bias,
    const Mask& mask,
    float* sums) {
  const int64_t dim = in.dim, size = (in.count + kChunks - 1) / kChunks;
  at::parallel_for(0, in.groups * kChunks, kGrain / std::max<int64_t>(1, size * dim) + 1, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(4 * dim);
    float *normed = buffer.data(), *grad_x = normed + dim, *shifted = grad_x + dim, *zeros = shifted + dim;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t group = chunk / kChunks, first = (chunk % kChunks) * size;
      const float *c = shift.of(group), *w = weight.of(group), *b = bias.of(group);
      float* gc = sums + (chunk % kChunks * 3 * in.groups + group) * dim;
      float *gw = gc + in.groups * dim, *gb = gw + in.groups * dim;
      for (int64_t n = first; n < std::min(first + size, in.count); ++n) {
        const T *x = in.of<T>(group, n), *gy = grad.of<T>(group, n);
        if (mask) {
          const float* factors = mask.of(group, n);
          masked_row(x, c, factors, dim, shifted);
          backward_row(shifted, gy, zeros, w, b, dim, normed, grad_x, gw, gb);
#pragma omp simd
          for (int64_t j = 0; j < dim; ++j) grad_x[j] *= factors[j];
        } else {
          backward_row(x, gy, c, w, b, dim, normed, grad_x, gw, gb);
        }
#pragma omp simd
        for (int64_t j = 0; j < dim; ++j) gc[j] += grad_x[j];
        convert(grad_x, dim, out.of<T>(group, n));
      }
    }
  });
}

// mish(LayerNorm((x + shift) · mask)) of rows [..., D], or [G, N, D] if each of G groups has its own vectors; without a mask its factors
// are 1.
inline at::Tensor norm_mish(
    const at::Tensor& x,
    const at::Tensor& shift,
    const at::Tensor& weight,
    const at::Tensor& bias,
    const std::optional<at::Tensor>& mask) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  const Rows in(x), out(y);
  const PerGroup c(shift, in.groups, in.dim), w(weight, in.groups, in.dim), b(bias, in.groups, in.dim);
  const Mask m(mask, in);
  for_type_of(in.x, [&](auto typed) { forward_rows<decltype(typed)>(in, out, c, w, b, m); });
  return y;
}

// → the gradients of x, shift, weight and bias.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_mish_backward(
    const at::Tensor& grad,
    const at::Tensor& x,
    const at::Tensor& shift,
    const at::Tensor& weight,
    const at::Tensor& bias,
    const std::optional<at::Tensor>& mask) {
  at::Tensor grad_x = at::empty(x.sizes(), x.options());
  const Rows in(x), out(grad_x), given(grad);
  const PerGroup c(shift, in.groups, in.dim), w(weight, in.groups, in.dim), b(bias, in.groups, in.dim);
  const Mask m(mask, in);
  const int64_t size = 3 * in.groups * in.dim;
  std::vector<float> sums(kChunks * size);
  for_type_of(in.x, [&](auto typed) { backward_rows<decltype(typed)>(given, in, out, c, w, b, m, sums.data()); });
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
