// How an MLP's last layer ends, row by row: plainly, in Mish like all others, in softmaxes of neighbouring features, or in the scalar that
// bins are expected to stand for.
//
// Roughly, where what comes next is rounded anyway (rough_rows.h).

#pragma once

#include "rough_rows.h"

#include <limits>
#include <numeric>

namespace specmpc {

// What a last layer ends in; a number above 0 is SimNorm's, the size of its groups. A norm comes before Mish and SimNorm.
constexpr int64_t kPlain = 0, kMish = -1;

inline bool can_end_in(int64_t what, int64_t features) { return what == kPlain || what == kMish || (what > 0 && features % what == 0); }

// Values of a group of eight, side by side.
typedef float Eight __attribute__((vector_size(8 * sizeof(float)), aligned(sizeof(float)), may_alias));

template <int... places>
SPECMPC_INLINED Eight shuffled(Eight v) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, places...);
#else
  typedef int32_t Places __attribute__((vector_size(8 * sizeof(int32_t))));
  return __builtin_shuffle(v, Places{places...});
#endif
}

// All eight combined, in each place.
template <typename Combine>
SPECMPC_INLINED Eight in_each(Eight v, Combine combine) {
  v = combine(v, shuffled<4, 5, 6, 7, 0, 1, 2, 3>(v));
  v = combine(v, shuffled<2, 3, 0, 1, 6, 7, 4, 5>(v));
  return combine(v, shuffled<1, 0, 3, 2, 5, 4, 7, 6>(v));
}

// Groups of x, each less its greatest value.
inline void below_greatest(float* x, int64_t dim, int64_t size) {
  for (int64_t first = 0; first < dim; first += size) {
    if (size == 8) {
      Eight& group = *reinterpret_cast<Eight*>(x + first);
      group -= in_each(group, [](Eight a, Eight b) { return a > b ? a : b; });
    } else {
      const float most = *std::max_element(x + first, x + first + size);
      for (int64_t j = first; j < first + size; ++j) x[j] -= most;
    }
  }
}

// Groups of x, each divided by its sum → y.
inline void shares(const float* x, int64_t dim, int64_t size, float* y) {
  for (int64_t first = 0; first < dim; first += size) {
    if (size == 8) {
      const Eight group = *reinterpret_cast<const Eight*>(x + first);
      *reinterpret_cast<Eight*>(y + first) = group / in_each(group, [](Eight a, Eight b) { return a + b; });
    } else {
      const float sum = std::accumulate(x + first, x + first + size, 0.0f);
      for (int64_t j = first; j < first + size; ++j) y[j] = x[j] / sum;
    }
  }
}

// y = softmaxes of groups of `size` neighbouring features, of which TD-MPC2 has eight; x is overwritten.
inline void softmax_row(float* x, int64_t dim, int64_t size, float* y) {
  below_greatest(x, dim, size);
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) x[j] = capped_exp(x[j]);
  shares(x, dim, size, y);
}

#ifdef SPECMPC_VNNI

// The eight values of each half, combined, in each of its places.
template <typename Combine>
SPECMPC_INLINED __m512 in_each_half(__m512 v, Combine combine) {
  v = combine(v, _mm512_shuffle_f32x4(v, v, 0xb1));  // neighbouring quarters, then pairs, then values change places
  v = combine(v, _mm512_permute_ps(v, 0x4e));
  return combine(v, _mm512_permute_ps(v, 0xb1));
}

// y ≈ softmaxes of groups of eight of LayerNorm(x), right to 2^-16.
inline void rough_norm_softmax_row(
    const float* x, const Moments& found, const float* weight, const float* bias, int64_t dim, float* y) {
  const __m512 two = _mm512_set1_ps(2.0f);
  const __m512 scale = _mm512_set1_ps(found.inverse_std), offset = _mm512_set1_ps(-found.mean * found.inverse_std);
  for_vectors(dim, [&](int64_t j, __mmask16 lanes) {
    const __m512 value = (load(x + j, lanes) * scale + offset) * load(weight + j, lanes) + load(bias + j, lanes);
    const __m512 e = rough_exp(value - in_each_half(value, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }));
    const __m512 sum = in_each_half(e, [](__m512 a, __m512 b) { return a + b; }), near = _mm512_rcp14_ps(sum);
    store(e * (near * (two - sum * near)), lanes, y + j);  // a step of Newton's
  });
}

#endif

// y = SimNorm(LayerNorm(x)) of one row; x is overwritten.
template <bool kRough>
void norm_softmax_row(float* x, const Moments& found, const float* weight, const float* bias, int64_t dim, int64_t size, float* y) {
#ifdef SPECMPC_VNNI
  if (kRough && size == 8) return rough_norm_softmax_row(x, found, weight, bias, dim, y);
#endif
  const float mean = found.mean, inverse_std = found.inverse_std;
#pragma omp simd
  for (int64_t j = 0; j < dim; ++j) x[j] = (x[j] - mean) * inverse_std * weight[j] + bias[j];
  softmax_row(x, dim, size, y);
}

// Bins of a distribution over scalars: so many, evenly spaced from low to high, in symlog space (twohot.py). They are counted from the
// middle, so that near it no digits cancel.
struct Bins {
  int64_t count;
  float middle, step;

  Bins(int64_t count, double low, double high) : count(count), middle((low + high) / 2.0), step((high - low) / (count - 1)) {}

  // The expected scalar of one row of logits, to which `shift` is added; they are overwritten.
  template <bool kRough>
  float expected(float* logits, const float* shift) const {
    return scalar(from_middle<kRough>(logits, shift));
  }

  // What a bin, counted from the middle, stands for: in symlog space, and as it is.
  float symlog(float bin) const { return middle + step * bin; }
  float scalar(float bin) const { return std::copysign(std::expm1(std::abs(symlog(bin))), symlog(bin)); }

 private:
  // The expected bin.
  template <bool kRough>
  float from_middle(float* logits, const float* shift) const {
    const float half = static_cast<float>(count - 1) / 2.0f;
    float most = -std::numeric_limits<float>::infinity(), sum = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < count; ++j) {
      logits[j] += shift[j];
      most = logits[j] > most ? logits[j] : most;  // std::max is not vectorised
    }
#ifdef SPECMPC_VNNI
    if constexpr (kRough) {
      const __m512 own_lane = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), greatest = _mm512_set1_ps(most);
      __m512 sums = {}, weighted_sums = {};
      for_vectors(count, [&](int64_t j, __mmask16 lanes) {
        const __m512 e = _mm512_maskz_mov_ps(lanes, rough_exp(load(logits + j, lanes) - greatest));
        sums += e;
        weighted_sums += e * (own_lane + _mm512_set1_ps(static_cast<float>(j) - half));
      });
      return _mm512_reduce_add_ps(weighted_sums) / _mm512_reduce_add_ps(sums);
    }
#endif
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t j = 0; j < count; ++j) {
      const float e = capped_exp(logits[j] - most);
      sum += e;
      weighted += e * (static_cast<float>(static_cast<int32_t>(j)) - half);  // 64 bits have no conversion without AVX-512
    }
    return weighted / sum;
  }
};

}  // namespace specmpc
