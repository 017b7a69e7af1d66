// Products of rows with a weight's rows in 8 bits, with the interface of those in products.h.
//
// An output's weights are multiples of one scale, from -127 to 127; a row's inputs are multiples of another, counted from an integer that
// stands for zero, from 0 to 255 (Jacob et al., 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only
// inference"; they fix the inputs' scales beforehand, here each row has its own). Integers are multiplied and summed exactly.
//
// Where rounding costs most it is done with care: inputs of two kinds, latents and actions, have a scale each, and what a plain last layer
// reads is rounded in two steps, the second for what is left of the first. On candidates of a plan that halves the error of their values.

#pragma once

#include "products.h"
#include "rough_rows.h"

#include <limits>

namespace specmpc {

// Steps of equal size, so many over this width; of size 0 if that has no inverse.
struct Steps {
  float size, inverse;
  Steps(float width, float count) : size(width / count), inverse(1.0f / size) {
    if (size < std::numeric_limits<float>::min()) size = inverse = 0.0f;
  }
};

// Rows in 8 bits, of `step` inputs: x ≈ (y - zero) · scale.
struct RoundedRows {
  uint8_t* values;
  int64_t step;
  float* scales;
  int32_t* zeros;

  // Rounds `count` inputs of row r, of which the first `lacking` are zeros that x does not have.
  void round(int64_t r, const float* x, int64_t count, int64_t lacking = 0) const {
    round(r, x, spread(x, count - lacking), count, lacking);
  }
  void round(int64_t r, const float* x, const Spread& found, int64_t count, int64_t lacking = 0) const {
    uint8_t* y = values + r * step;
    if (!found.finite) {  // which must not be hidden
      std::fill_n(y, step, uint8_t{0});
      scales[r] = std::numeric_limits<float>::quiet_NaN();
      zeros[r] = 0;
      return;
    }
    const Steps steps(found.high - found.low, 255.0f);
    const float inverse = steps.inverse;
    const int32_t zero = static_cast<int32_t>(std::rint(-found.low * inverse));
    scales[r] = steps.size;
    zeros[r] = zero;
    std::fill_n(y, lacking, static_cast<uint8_t>(zero));
    std::fill(y + count, y + step, static_cast<uint8_t>(zero));
    y += lacking;
    count -= lacking;
    int64_t k = 0;
#ifdef SPECMPC_VNNI
    const __m512 factor = _mm512_set1_ps(inverse);
    const __m512i offset = _mm512_set1_epi32(zero);
    for (; k + 16 <= count; k += 16) {  // the compiler narrows in several steps
      const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + k), factor)), offset);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(y + k), _mm512_cvtusepi32_epi8(_mm512_max_epi32(whole, _mm512_setzero_si512())));
    }
#endif
    for (; k < count; ++k) y[k] = static_cast<uint8_t>(std::clamp(static_cast<int32_t>(std::rint(x[k] * inverse)) + zero, 0, 255));
  }

  // What rounding row r has left of x, in place of it.
  void rest(int64_t r, float* x, int64_t count) const {
    const uint8_t* y = values + r * step;
    const float scale = scales[r];
    const int32_t zero = zeros[r];
#pragma omp simd
    for (int64_t k = 0; k < count; ++k) x[k] -= static_cast<float>(y[k] - zero) * scale;
  }
};

// Sums fit 32 bits for kMostInputs inputs and fewer.
class Int8Product {
 public:
  static constexpr int64_t kMostInputs = 1 << 16;

  using Given = float;
  using Weight = int8_t;

  static constexpr int64_t kRows = 8, kInputs = 4, kOutputs = 32;

  // What a layer hands on to the next: rows that are rounded while they are in the first cache, and what that left of them.
  struct Features {
    RoundedRows rows, rest;
    float* row;

    Features(int64_t count, int64_t widest) {
      static thread_local RowsScratch rows_scratch, rest_scratch;
      static thread_local Scratch<float> row_scratch;
      rows = rows_scratch.at_least(count, round_up(widest, kInputs));
      rest = rest_scratch.at_least(count, round_up(widest, kInputs));
      row = row_scratch.at_least(widest);
    }
  };

  Int8Product(int64_t in, int64_t out, Care care = {}) : in_(in), out_(out), padded_in_(round_up(in, kInputs)), care_(care) {}

  int64_t padded_outputs() const { return round_up(out_, kOutputs); }
  int64_t panels() const { return padded_outputs() / kOutputs; }
  int64_t packed_size() const { return panels() * panel_size(); }

  // A panel has its outputs' scales, the sums of their weights, and then, for each four inputs, the fours of all outputs: four inputs are
  // what an instruction takes.
  void pack(const float* weight, int64_t step, int64_t panel, int8_t* packed) const {
    int8_t* to = packed + panel * panel_size();
    std::fill_n(to, panel_size(), int8_t{0});
    std::vector<int8_t> rounded(padded_in_);
    for (int64_t j = 0; j < std::min(kOutputs, out_ - panel * kOutputs); ++j) {
      const float* output = weight + (panel * kOutputs + j) * step;
      const Spread found = spread(output, in_);
      const Steps steps(std::max(found.high, -found.low), 127.0f);
      const float inverse = steps.inverse, scale = found.finite ? steps.size : std::numeric_limits<float>::quiet_NaN();
      std::memcpy(to + j * sizeof(float), &scale, sizeof(float));
      if (!found.finite) continue;
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t k = 0; k < in_; ++k) {
        const int32_t whole = static_cast<int32_t>(std::rint(output[k] * inverse));
        rounded[k] = static_cast<int8_t>(whole);
        sum += whole;
      }
      std::memcpy(to + kScales + j * sizeof(int32_t), &sum, sizeof(sum));
      for (int64_t k = 0; k < padded_in_; k += kInputs) std::memcpy(to + kHead + k * kOutputs + j * kInputs, &rounded[k], kInputs);
    }
  }

  // `count` rows, `step` apart, of all inputs but the first `skipped` → sums [count, padded_outputs()], behind which there is room up to a
  // multiple of kRows.
  void multiply(const float* x, int64_t step, int64_t count, int64_t skipped, const int8_t* packed, float* sums) const {
    const int64_t end = skipped < care_.apart && care_.apart < in_ ? care_.apart : in_;
    multiply_part(x, step, count, skipped, end, packed, sums, false);
    if (end < in_) multiply_part(x + end - skipped, step, count, end, in_, packed, sums, true);
  }

  // Inputs that another layer makes, row by row.
  template <typename Make>
  void take(Features& features, int64_t r, Make make) const {
    features.rows.step = features.rest.step = padded_in_;
    Spread found;
    make(RoughRow{features.row, &found});
    features.rows.round(r, features.row, found, in_);
    if (care_.fine) {
      features.rows.rest(r, features.row, in_);
      features.rest.round(r, features.row, in_);
    }
  }
  void multiply(const Features& features, int64_t count, const int8_t* packed, float* sums) const {
    multiply_rounded(features.rows, count, 0, packed, sums, false);
    if (care_.fine) multiply_rounded(features.rest, count, 0, packed, sums, true);
  }

  // Whether this machine has instructions for such products.
  static bool fast() {
#ifdef SPECMPC_VNNI
    return true;
#else
    return false;
#endif
  }

 private:
  static constexpr int64_t kScales = kOutputs * sizeof(float), kHead = kScales + kOutputs * sizeof(int32_t);  // bytes

  int64_t in_, out_, padded_in_;
  Care care_;

  struct RowsScratch {
    Scratch<uint8_t> values;
    Scratch<float> scales;
    Scratch<int32_t> zeros;
    RoundedRows at_least(int64_t rows, int64_t step) {
      return {values.at_least(rows * step), step, scales.at_least(rows), zeros.at_least(rows)};
    }
  };

  int64_t panel_size() const { return kHead + kOutputs * padded_in_; }

  // Of the inputs from `begin` to `end`, which rows of x have.
  void multiply_part(
      const float* x, int64_t step, int64_t count, int64_t begin, int64_t end, const int8_t* packed, float* sums, bool add) const {
    static thread_local RowsScratch scratch;
    const int64_t first = begin / kInputs * kInputs;
    const RoundedRows rows = scratch.at_least(round_up(count, kRows), round_up(end - first, kInputs));
    for (int64_t r = 0; r < count; ++r) rows.round(r, x + r * step, end - first, begin - first);
    multiply_rounded(rows, count, first, packed, sums, add);
  }

  // Of the inputs from `first` on, as many as the rows have. What is computed for rows beyond `count` is nobody's.
  void multiply_rounded(const RoundedRows& rows, int64_t count, int64_t first, const int8_t* packed, float* sums, bool add) const {
    const int64_t depth = rows.step;
    const bool all = depth == padded_in_;
    const std::vector<uint8_t> ones(all ? 0 : depth, 1);  // a row of which sums a part of the weights
    for (int64_t panel = 0; panel < panels(); ++panel) {
      const int8_t *head = packed + panel * panel_size(), *weights = head + kHead + first * kOutputs;
      const float* weight_scales = reinterpret_cast<const float*>(head);
      int32_t found[kRows * kOutputs], some_sums[kOutputs];
      if (!all) tile<1>(ones.data(), depth, weights, some_sums);
      const int32_t* weight_sums = all ? reinterpret_cast<const int32_t*>(head + kScales) : some_sums;
      for (int64_t r = 0; r < count; r += kRows) {
        tile<kRows>(rows.values + r * depth, depth, weights, found);
        for (int64_t i = 0; i < kRows; ++i) {
          const int32_t zero = rows.zeros[r + i];
          const float scale = rows.scales[r + i];
          float* to = sums + (r + i) * padded_outputs() + panel * kOutputs;
#pragma omp simd
          for (int64_t j = 0; j < kOutputs; ++j) {
            to[j] = (add ? to[j] : 0.0f) + (found[i * kOutputs + j] - zero * weight_sums[j]) * (scale * weight_scales[j]);
          }
        }
      }
    }
  }

  // R rows of `depth` inputs with one panel of weights → sums [R, kOutputs].
  template <int64_t R>
  static void tile(const uint8_t* x, int64_t depth, const int8_t* weights, int32_t* sums) {
#ifdef SPECMPC_VNNI
    constexpr int64_t kLanes = 16;
    __m512i sum[R][2];
    for (int64_t r = 0; r < R; ++r) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k += kInputs) {
      const int8_t* fours = weights + k * kOutputs;
      const __m512i left = _mm512_loadu_si512(fours), right = _mm512_loadu_si512(fours + kInputs * kLanes);
      for (int64_t r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * depth + k, sizeof(four));
        const __m512i everywhere = _mm512_set1_epi32(four);
        sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], everywhere, left);
        sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], everywhere, right);
      }
    }
    for (int64_t r = 0; r < R; ++r) {
      _mm512_storeu_si512(sums + r * kOutputs, sum[r][0]);
      _mm512_storeu_si512(sums + r * kOutputs + kLanes, sum[r][1]);
    }
#else
    std::fill_n(sums, R * kOutputs, 0);
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t k = 0; k < depth; ++k) {
        const int8_t* ones = weights + k / kInputs * kInputs * kOutputs + k % kInputs;
        for (int64_t j = 0; j < kOutputs; ++j) sums[r * kOutputs + j] += x[r * depth + k] * ones[kInputs * j];
      }
    }
#endif
  }
};

}  // namespace specmpc
