// A shift, LayerNorm and Mish in one pass, and their gradient: what is between the matrix products of every TD-MPC2 network.
//
// A row is read once and stays in the first cache. Inductor's kernel for the same expression takes more than twice as long on a CPU: it
// computes the row's standard deviation again for each vector of the row, and calls a library for each exponential.
// Everything is computed in fp32, whatever the rows are stored in. Plain loops: the compiler vectorises them for the machine it runs on.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace {

constexpr float kEps = 1e-5f;
constexpr int64_t kChunks = 16;  // of rows whose gradients are summed apart: fixed, so that sums do not depend on the number of threads
constexpr int64_t kGrain = 8192;  // elements that are worth a thread

inline float to_float(float x) { return x; }
inline float to_float(at::BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.x) << 16); }

template <typename T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline at::BFloat16 from_float<at::BFloat16>(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  return at::BFloat16(static_cast<uint16_t>(x != x ? 0x7fc0u : rounded), at::BFloat16::from_bits());
}

// exp(x), to about 1e-6: 2^k · 2^r with |r| <= 1/2, the latter by its Taylor polynomial. From about x = 21 on it stays near 2^30, where
// Mish is the identity in fp32. The exponent is clamped and not x: with a clamped x the compiler follows three cases, which takes twice
// as long.
inline float exp_for_mish(float x) {
  const float t = x * 1.44269504f;
  const float k = std::rint(t);
  const float r = t - k;
  float p = 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  const int32_t exponent = std::max(static_cast<int32_t>(std::min(k, 30.0f)), -127) + 127;
  return p * std::bit_cast<float>(exponent << 23);
}

// layers.mish: x · n/(n+2) with n = eˣ(eˣ+2).
inline float mish(float x) {
  const float e = exp_for_mish(x);
  const float n = e * (e + 2.0f);
  return x * (n / (n + 2.0f));
}

inline float mish_slope(float x) {
  const float e = exp_for_mish(x);
  const float n = e * (e + 2.0f);
  const float inverse = 1.0f / (n + 2.0f);
  return (n + 4.0f * x * e * (e + 1.0f) * inverse) * inverse;
}

struct Moments {
  float mean, inverse_std;
};

template <typename T>
inline Moments moments(const T* x, const float* shift, int64_t dim) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum) simdlen(32)
  for (int64_t j = 0; j < dim; ++j) {
    sum += to_float(x[j]) + shift[j];
  }
  const float mean = sum / dim;
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares) simdlen(32)
  for (int64_t j = 0; j < dim; ++j) {
    const float centred = to_float(x[j]) + shift[j] - mean;
    squares += centred * centred;
  }
  return {mean, 1.0f / std::sqrt(squares / dim + kEps)};
}

// One vector [D] for all groups, or one for each, [G, D].
struct PerGroup {
  at::Tensor values;
  int64_t step;

  PerGroup(const at::Tensor& given, int64_t groups, int64_t dim) : values(given.contiguous()), step(given.dim() == 2 ? dim : 0) {
    TORCH_CHECK(values.scalar_type() == at::kFloat, "norm_mish: shift, weight and bias must be fp32");
    const bool fits = given.dim() <= 2 && values.size(-1) == dim && (step == 0 || values.size(0) == groups);
    TORCH_CHECK(fits, "norm_mish: vectors of another shape");
  }
  const float* of(int64_t group) const { return values.const_data_ptr<float>() + group * step; }
};

// Rows [G, N, D]: of any strides but the last one's.
struct Rows {
  at::Tensor x;
  int64_t groups, count, dim;

  explicit Rows(const at::Tensor& given) : dim(given.size(-1)) {
    x = given.dim() == 3 ? given : given.reshape({1, -1, dim});
    if (x.stride(2) != 1) x = x.contiguous();
    groups = x.size(0);
    count = x.size(1);
  }
  int64_t group_of(int64_t row) const { return row / count; }

  template <typename T>
  T* row(int64_t index) const {
    return x.data_ptr<T>() + (index / count) * x.stride(0) + (index % count) * x.stride(1);
  }
};

template <typename T>
void forward_rows(const Rows& in, const Rows& out, const PerGroup& shift, const PerGroup& weight, const PerGroup& bias) {
  const int64_t dim = in.dim;
  at::parallel_for(0, in.groups * in.count, std::max<int64_t>(1, kGrain / dim), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* x = in.row<T>(i);
      T* y = out.row<T>(i);
      const int64_t group = in.group_of(i);
      const float *c = shift.of(group), *w = weight.of(group), *b = bias.of(group);
      const Moments found = moments(x, c, dim);
      const float mean = found.mean, inverse_std = found.inverse_std;  // clang takes no structured bindings into simd loops
#pragma omp simd
      for (int64_t j = 0; j < dim; ++j) {
        y[j] = from_float<T>(mish((to_float(x[j]) + c[j] - mean) * inverse_std * w[j] + b[j]));
      }
    }
  });
}

// `sums` [3, G, chunks, D]: the gradients of shift, weight and bias, summed over the rows of each chunk.
template <typename T>
void backward_rows(
    const Rows& grad,
    const Rows& in,
    const Rows& out,
    const PerGroup& shift,
    const PerGroup& weight,
    const PerGroup& bias,
    const at::Tensor& sums) {
  const int64_t dim = in.dim, size = (in.count + kChunks - 1) / kChunks;
  at::parallel_for(0, in.groups * kChunks, std::max<int64_t>(1, kGrain / (size * dim)), [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(2 * dim);
    float *normed = buffer.data(), *grad_normed = normed + dim;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t group = chunk / kChunks, first = (chunk % kChunks) * size;
      const float *c = shift.of(group), *w = weight.of(group), *b = bias.of(group);
      float* gc = sums.mutable_data_ptr<float>() + chunk * dim;
      float *gw = gc + sums.stride(0), *gb = gw + sums.stride(0);
      for (int64_t n = first; n < std::min(first + size, in.count); ++n) {
        const int64_t i = group * in.count + n;
        const T *x = in.row<T>(i), *gy = grad.row<T>(i);
        T* gx = out.row<T>(i);
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
          gx[j] = from_float<T>(g);
        }
      }
    }
  });
}

// Calls with a value of the rows' type.
template <typename Function>
void for_type_of(const at::Tensor& x, Function call) {
  if (x.scalar_type() == at::kBFloat16) {
    call(at::BFloat16());
  } else {
    TORCH_CHECK(x.scalar_type() == at::kFloat, "norm_mish: rows must be fp32 or bf16");
    call(float());
  }
}

at::Tensor norm_mish(const at::Tensor& x, const at::Tensor& shift, const at::Tensor& weight, const at::Tensor& bias) {
  at::Tensor y = at::empty(x.sizes(), x.options());
  const Rows in(x), out(y);
  const PerGroup c(shift, in.groups, in.dim), w(weight, in.groups, in.dim), b(bias, in.groups, in.dim);
  for_type_of(in.x, [&](auto typed) { forward_rows<decltype(typed)>(in, out, c, w, b); });
  return y;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> norm_mish_backward(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& shift, const at::Tensor& weight, const at::Tensor& bias) {
  at::Tensor grad_x = at::empty(x.sizes(), x.options());
  const Rows in(x), out(grad_x), given(grad);
  const PerGroup c(shift, in.groups, in.dim), w(weight, in.groups, in.dim), b(bias, in.groups, in.dim);
  const at::Tensor sums = at::zeros({3, in.groups, kChunks, in.dim}, weight.options());
  for_type_of(in.x, [&](auto typed) { backward_rows<decltype(typed)>(given, in, out, c, w, b, sums); });
  const at::Tensor per_group = sums.sum(2);
  const auto part = [&](int64_t index, const at::Tensor& like) {
    return like.dim() == 2 ? per_group[index].clone() : per_group[index].sum(0);  // outputs must not share memory
  };
  return {grad_x, part(0, shift), part(1, weight), part(2, bias)};
}

}  // namespace

TORCH_LIBRARY(specmpc, m) {
  m.def("norm_mish(Tensor x, Tensor shift, Tensor weight, Tensor bias) -> Tensor");
  m.def("norm_mish_backward(Tensor grad, Tensor x, Tensor shift, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(specmpc, CPU, m) {
  m.impl("norm_mish", norm_mish);
  m.impl("norm_mish_backward", norm_mish_backward);
}
