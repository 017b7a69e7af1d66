// What the kernels have in common: rows and vectors in memory, and the arithmetic of a row.
//
// Everything is computed in fp32, whatever the rows are stored in. Plain loops, but for one instruction: the compiler vectorises them for
// the machine it runs on.

#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// A call that the compiler does not inline ends the vectorising of the loop around it.
#define SPECMPC_INLINED __attribute__((always_inline)) inline

namespace specmpc {

constexpr float kEps = 1e-5f;
constexpr int64_t kGrain = 8192;  // elements that are worth a thread
constexpr int64_t kLine = 64;  // bytes of a cache line

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

// Copies `count` values, rounded where the type is narrower.
inline void convert(const float* from, int64_t count, float* to) { std::copy_n(from, count, to); }
inline void convert(const at::BFloat16* from, int64_t count, at::BFloat16* to) { std::copy_n(from, count, to); }
inline void convert(const float* from, int64_t count, at::BFloat16* to) {
  int64_t k = 0;
#ifdef __AVX512BF16__
  for (; k + 32 <= count; k += 32) {  // the compiler does not find this instruction; it takes subnormals as zero, which the rest does not
    _mm512_storeu_si512(to + k, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + k + 16), _mm512_loadu_ps(from + k)));
  }
#endif
#pragma omp simd
  for (int64_t rest = k; rest < count; ++rest) to[rest] = from_float<at::BFloat16>(from[rest]);
}

// exp(x), to about 1e-6: 2^k · 2^r with |r| <= 1/2, the latter by its Taylor polynomial. From about x = 21 on it stays near 2^30, where
// Mish is the identity in fp32; nothing else takes it of so much. The exponent is clamped and not x: with a clamped x the compiler follows
// three cases, which takes twice as long.
SPECMPC_INLINED float capped_exp(float x) {
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

// norm_mish.mish: x · n/(n+2) with n = eˣ(eˣ+2).
SPECMPC_INLINED float mish(float x) {
  const float e = capped_exp(x);
  const float n = e * (e + 2.0f);
  return x * (n / (n + 2.0f));
}

SPECMPC_INLINED float mish_slope(float x) {
  const float e = capped_exp(x);
  const float n = e * (e + 2.0f);
  const float inverse = 1.0f / (n + 2.0f);
  return (n + 4.0f * x * e * (e + 1.0f) * inverse) * inverse;
}

// tanh(x), right to 2e-7; what is not a number stays so.
SPECMPC_INLINED float tanh_of(float x) {
  const float near = x > 10.0f ? 10.0f : x < -10.0f ? -10.0f : x;  // beyond it is 1 to fp32
  return 1.0f - 2.0f / (capped_exp(2.0f * near) + 1.0f);
}

struct Moments {
  float mean, inverse_std;
};

// Rows whose moments are found before any of them goes on: they need not wait for each other, and are still in the first cache then.
constexpr int64_t kTogether = 8;

// Of `dim` values, which `at` has. In one pass: squares are of distances to the mean of the first values, which is at most √(dim / kFirst)
// standard deviations from the mean of all, so that no more digits cancel than that.
template <typename At>
SPECMPC_INLINED Moments moments(int64_t dim, At at) {
  constexpr int64_t kFirst = 64;
  const int64_t some = std::min(dim, kFirst);
  float near = 0.0f, sum = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : near) simdlen(32)
  for (int64_t j = 0; j < some; ++j) near += at(j);
  near /= some;
#pragma omp simd reduction(+ : sum, squares) simdlen(32)
  for (int64_t j = 0; j < dim; ++j) {
    const float distance = at(j) - near;
    sum += distance;
    squares += distance * distance;
  }
  const float rest = sum / dim, variance = std::max(squares / dim - rest * rest, 0.0f);
  return {near + rest, 1.0f / std::sqrt(variance + kEps)};
}

// x += shift, and what LayerNorm needs of it.
inline Moments shifted(float* x, const float* shift, int64_t dim) {
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) x[j] += shift[j];
  return moments(dim, [x](int64_t j) { return x[j]; });
}

// y = mish(LayerNorm(x)) of one row.
template <typename Out>
inline void mish_row(const float* x, const Moments& found, const float* weight, const float* bias, int64_t dim, Out* y) {
  const float mean = found.mean, inverse_std = found.inverse_std;
  constexpr int64_t kSome = 64;  // at a time, in fp32
  float some[kSome];
  for (int64_t first = 0; first < dim; first += kSome) {
    const int64_t count = std::min(kSome, dim - first);
#pragma omp simd
    for (int64_t j = first; j < first + count; ++j) some[j - first] = mish((x[j] - mean) * inverse_std * weight[j] + bias[j]);
    convert(some, count, y + first);
  }
}

// One vector [D] for all groups, or one for each, [G, D].
class PerGroup {
 public:
  PerGroup(const at::Tensor& given, int64_t groups, int64_t dim) : values(given.contiguous()), step(given.dim() == 2 ? dim : 0) {
    TORCH_CHECK(values.scalar_type() == at::kFloat, "specmpc: vectors must be fp32");
    const bool fits = given.dim() <= 2 && values.size(-1) == dim && (step == 0 || values.size(0) == groups);
    TORCH_CHECK(fits, "specmpc: vectors of another shape");
    data = values.const_data_ptr<float>();
  }
  const float* of(int64_t group) const { return data + group * step; }

 private:
  at::Tensor values;
  int64_t step;
  const float* data = nullptr;
};

// Rows [N, D] or [G, N, D]: of any strides but the last one's.
struct Rows {
  at::Tensor x;
  int64_t groups, count, dim, step;  // from one row of a group to the next

  explicit Rows(const at::Tensor& given) : x(given.dim() == 2 || given.dim() == 3 ? given : given.reshape({-1, given.size(-1)})) {
    if (x.stride(-1) != 1) x = x.contiguous();
    groups = x.dim() == 3 ? x.size(0) : 1;
    count = x.size(-2);
    dim = x.size(-1);
    step = x.stride(-2);
    group_step_ = x.dim() == 3 ? x.stride(0) : 0;
    data_ = x.data_ptr();
  }

  // T is the tensor's type.
  template <typename T>
  T* of(int64_t group, int64_t first = 0) const {
    return static_cast<T*>(data_) + group * group_step_ + first * step;
  }

 private:
  int64_t group_step_;
  void* data_;
};

inline at::Tensor empty_like(const at::Tensor& given) { return at::empty(given.sizes(), given.options()); }

// Units begin to end, of `count` in each group, as runs within a group: calls with the group, its first unit and how many.
template <typename Function>
void for_runs(int64_t begin, int64_t end, int64_t count, Function call) {
  while (begin < end) {
    const int64_t first = begin % count, some = std::min(end - begin, count - first);
    call(begin / count, first, some);
    begin += some;
  }
}

}  // namespace specmpc
