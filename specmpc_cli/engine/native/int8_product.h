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

#include <limits>
#include <span>

namespace specmpc {

// Steps of equal size, so many over this width; of size 0 if that has no inverse.
struct Steps {
  float size = 0.0f, inverse = 0.0f;

  Steps() = default;
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
#ifdef SPECMPC_VNNI
    const __m512 factor = _mm512_set1_ps(inverse);
    const __m512i offset = _mm512_set1_epi32(zero);
    for_vectors(count, [&](int64_t k, __mmask16 lanes) {  // the compiler narrows in several steps
      store_levels(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(load(x + k, lanes), factor)), offset), lanes, y + k);
    });
#else
    for (int64_t k = 0; k < count; ++k) {
      y[k] = static_cast<uint8_t>(std::clamp(static_cast<int32_t>(std::rint(x[k] * inverse)) + zero, 0, 255));
    }
#endif
  }

  // As above, and what that leaves of x, which is half a step at most, into row r of `rest`.
  void round_twice(int64_t r, const float* x, const Spread& found, int64_t count, const RoundedRows& rest) const {
    round(r, x, found, count);
    constexpr int32_t kMiddle = 128;
    const uint8_t* y = values + r * step;
    const float size = found.finite ? scales[r] : 0.0f;
    const int32_t zero = zeros[r];
    const Steps steps(size, 255.0f);
    uint8_t* to = rest.values + r * rest.step;
    rest.scales[r] = steps.size;
    rest.zeros[r] = kMiddle;
    std::fill(found.finite ? to + count : to, to + rest.step, static_cast<uint8_t>(kMiddle));
    if (!found.finite) return;
#ifdef SPECMPC_VNNI
    const __m512 whole = _mm512_set1_ps(size), factor = _mm512_set1_ps(steps.inverse);
    const __m512i offset = _mm512_set1_epi32(zero), middle = _mm512_set1_epi32(kMiddle);
    for_vectors(count, [&](int64_t k, __mmask16 lanes) {
      const __m512i level = _mm512_sub_epi32(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(lanes, y + k)), offset);
      const __m512 left = _mm512_fnmadd_ps(_mm512_cvtepi32_ps(level), whole, load(x + k, lanes));
      store_levels(_mm512_add_epi32(_mm512_cvtps_epi32(_mm512_mul_ps(left, factor)), middle), lanes, to + k);
    });
#else
    for (int64_t k = 0; k < count; ++k) {
      const float left = x[k] - static_cast<float>(y[k] - zero) * size;
      to[k] = static_cast<uint8_t>(std::clamp(static_cast<int32_t>(std::rint(left * steps.inverse)) + kMiddle, 0, 255));
    }
#endif
  }

 private:
#ifdef SPECMPC_VNNI
  // Those that 8 bits hold, else the nearest.
  SPECMPC_INLINED static void store_levels(__m512i levels, __mmask16 lanes, uint8_t* to) {
    _mm_mask_storeu_epi8(to, lanes, _mm512_cvtusepi32_epi8(_mm512_max_epi32(levels, _mm512_setzero_si512())));
  }
#endif
};

// Sixteen values side by side.
typedef int32_t Ints __attribute__((vector_size(64), may_alias));
typedef float Floats __attribute__((vector_size(64), may_alias));

template <typename Values>
SPECMPC_INLINED Values loaded(const void* from) {
  Values values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

// Sums fit 32 bits for kMostInputs inputs and fewer.
class Int8Product {
 public:
  static constexpr int64_t kMostInputs = 1 << 16;

  using Weight = int8_t;

  static constexpr int64_t kRows = 8, kInputs = 4, kOutputs = 32;
  static constexpr bool kRough = true;

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
    constexpr int64_t kSome = kBlock * kInputs;  // inputs of an output that are rounded at a time
    int8_t* head = packed + panel * panel_size();
    std::fill_n(head, kHead, int8_t{0});
    for (int64_t first = 0; first < kOutputs; first += kBlock) {
      Steps steps[kBlock];
      const float* outputs[kBlock];
      int32_t sums[kBlock] = {};
      for (int64_t j = 0; j < kBlock; ++j) {
        const int64_t output = panel * kOutputs + first + j;
        outputs[j] = output < out_ ? weight + output * step : nullptr;
        if (!outputs[j]) continue;
        const Spread found = spread(outputs[j], in_);
        steps[j] = Steps(std::max(found.high, -found.low), 127.0f);
        const float scale = found.finite ? steps[j].size : std::numeric_limits<float>::quiet_NaN();
        std::memcpy(head + (first + j) * sizeof(scale), &scale, sizeof(scale));
        if (!found.finite) outputs[j] = nullptr;  // there is nothing to round
      }
      for (int64_t from = 0; from < padded_in_; from += kSome) {
        const int64_t some = std::min(kSome, in_ - from), fours = std::min(kBlock, (padded_in_ - from) / kInputs);
        alignas(64) FourBytes block[kBlock][kBlock] = {};
        for (int64_t j = 0; j < kBlock; ++j) {
          if (outputs[j]) sums[j] += round_weights(outputs[j] + from, some, steps[j].inverse, reinterpret_cast<int8_t*>(block[j]));
        }
        transpose(block);
        int8_t* to = head + kHead + from * kOutputs + first * kInputs;
        for (int64_t k = 0; k < fours; ++k) std::memcpy(to + k * kInputs * kOutputs, block[k], sizeof(block[k]));
      }
      std::memcpy(head + kScales + first * sizeof(int32_t), sums, sizeof(sums));
    }
  }

  // `count` rows, `step` apart, of all inputs but the first `skipped` → sums [count, padded_outputs()], behind which there is room up to a
  // multiple of kRows.
  void multiply(const float* x, int64_t step, int64_t count, int64_t skipped, const int8_t* packed, float* sums) const {
    static thread_local RowsScratch scratch[2];
    const int64_t end = skipped < care_.apart && care_.apart < in_ ? care_.apart : in_;
    const Operand first = rounded(x, step, count, skipped, end, scratch[0]);
    if (end == in_) return multiply_rounded({&first, 1}, count, packed, sums);
    const Operand both[] = {first, rounded(x + end - skipped, step, count, end, in_, scratch[1])};
    multiply_rounded(both, count, packed, sums);
  }

  // Inputs that another layer makes, row by row.
  template <typename Make>
  void take(Features& features, int64_t r, Make make) const {
    features.rows.step = features.rest.step = padded_in_;
    Spread found;
    make(RoughRow{features.row, &found});
    if (care_.fine) {
      features.rows.round_twice(r, features.row, found, in_, features.rest);
    } else {
      features.rows.round(r, features.row, found, in_);
    }
  }
  void multiply(const Features& features, int64_t count, const int8_t* packed, float* sums) const {
    const Operand both[] = {{features.rows, 0}, {features.rest, 0}};
    multiply_rounded({both, care_.fine ? 2u : 1u}, count, packed, sums);
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
  static constexpr int64_t kLanes = kOutputs / 2;
  static constexpr size_t kMostOperands = 2;

  int64_t in_, out_, padded_in_;
  Care care_;

  // → the sum of those that are rounded.
  static int32_t round_weights(const float* weights, int64_t count, float inverse, int8_t* to) {
#ifdef SPECMPC_VNNI
    __m512i sum = {};
    const __m512 factor = _mm512_set1_ps(inverse);
    for_vectors(count, [&](int64_t k, __mmask16 lanes) {
      const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load(weights + k, lanes), factor));
      sum = _mm512_add_epi32(sum, whole);
      _mm_mask_storeu_epi8(to + k, lanes, _mm512_cvtepi32_epi8(whole));
    });
    return _mm512_reduce_add_epi32(sum);
#else
    int32_t sum = 0;
    for (int64_t k = 0; k < count; ++k) {
      to[k] = static_cast<int8_t>(std::rint(weights[k] * inverse));
      sum += to[k];
    }
    return sum;
#endif
  }

  struct RowsScratch {
    Scratch<uint8_t> values;
    Scratch<float> scales;
    Scratch<int32_t> zeros;
    RoundedRows at_least(int64_t rows, int64_t step) {
      return {values.at_least(rows * step), step, scales.at_least(rows), zeros.at_least(rows)};
    }
  };

  int64_t panel_size() const { return kHead + kOutputs * padded_in_; }

  // Rows of the inputs from `first` on, a multiple of kInputs; as many as they have.
  struct Operand {
    RoundedRows rows;
    int64_t first;
  };

  // Of the inputs from `begin` to `end`, which rows of x have.
  static Operand rounded(const float* x, int64_t step, int64_t count, int64_t begin, int64_t end, RowsScratch& scratch) {
    const int64_t first = begin / kInputs * kInputs;
    const RoundedRows rows = scratch.at_least(round_up(count, kRows), round_up(end - first, kInputs));
    for (int64_t r = 0; r < count; ++r) rows.round(r, x + r * step, end - first, begin - first);
    return {rows, first};
  }

  // The sum of all operands' products. What is computed for rows beyond `count` is nobody's.
  void multiply_rounded(std::span<const Operand> operands, int64_t count, const int8_t* packed, float* sums) const {
    for (int64_t panel = 0; panel < panels(); ++panel) {
      const int8_t* head = packed + panel * panel_size();
      float* to = sums + panel * kOutputs;
      if (out_ - panel * kOutputs > kLanes) {
        multiply_panel<2>(operands, count, head, to);
      } else {
        multiply_panel<1>(operands, count, head, to);
      }
    }
  }

  // V·kLanes of a panel's outputs.
  template <int64_t V>
  void multiply_panel(std::span<const Operand> operands, int64_t count, const int8_t* head, float* sums) const {
    Floats weight_scales[V];
    for (int64_t v = 0; v < V; ++v) weight_scales[v] = loaded<Floats>(head + v * sizeof(Floats));
    Ints weight_sums[kMostOperands][V];
    for (size_t o = 0; o < operands.size(); ++o) sum_weights(operands[o], head, weight_sums[o]);
    for (int64_t r = 0; r < count; r += kRows) {
      float* to = sums + r * padded_outputs();
      multiply_tile<V, false>(operands[0], r, head, weight_scales, weight_sums[0], to);
      for (size_t o = 1; o < operands.size(); ++o) multiply_tile<V, true>(operands[o], r, head, weight_scales, weight_sums[o], to);
    }
  }

  // kRows rows from r on; `kAdd`: to what is there.
  template <int64_t V, bool kAdd>
  void multiply_tile(
      const Operand& operand,
      int64_t r,
      const int8_t* head,
      const Floats (&weight_scales)[V],
      const Ints (&weight_sums)[V],
      float* sums) const {
    const RoundedRows& rows = operand.rows;
    Ints found[kRows][V] = {};
    dot<kRows, V>(rows.values + r * rows.step, rows.step, head + kHead + operand.first * kOutputs, found);
#pragma GCC unroll 8
    for (int64_t i = 0; i < kRows; ++i) {
      float* to = sums + i * padded_outputs();
#pragma GCC unroll 2
      for (int64_t v = 0; v < V; ++v) {
        const Ints own = found[i][v] - rows.zeros[r + i] * weight_sums[v];
        Floats value = __builtin_convertvector(own, Floats) * (rows.scales[r + i] * weight_scales[v]);
        if constexpr (kAdd) value += loaded<Floats>(to + v * kLanes);
        std::memcpy(to + v * kLanes, &value, sizeof(value));
      }
    }
  }

  // Of the inputs that an operand has.
  template <int64_t V>
  void sum_weights(const Operand& operand, const int8_t* head, Ints (&sums)[V]) const {
    const int64_t depth = operand.rows.step;
    if (depth == padded_in_) {
      for (int64_t v = 0; v < V; ++v) sums[v] = loaded<Ints>(head + kScales + v * sizeof(Ints));
      return;
    }
    static thread_local Scratch<uint8_t> scratch;
    uint8_t* ones = scratch.at_least(depth);
    std::fill_n(ones, depth, uint8_t{1});
    Ints found[1][V] = {};
    dot<1, V>(ones, depth, head + kHead + operand.first * kOutputs, found);
    std::copy_n(found[0], V, sums);
  }

  // R rows of `depth` inputs with the weights of V·kLanes outputs, added to `sums`.
  template <int64_t R, int64_t V>
  static void dot(const uint8_t* x, int64_t depth, const int8_t* weights, Ints (&sums)[R][V]) {
#ifdef SPECMPC_VNNI
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; k += kInputs) {
      Ints fours[V];
      for (int64_t v = 0; v < V; ++v) fours[v] = loaded<Ints>(weights + k * kOutputs + v * sizeof(Ints));
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x + r * depth + k, sizeof(four));
        for (int64_t v = 0; v < V; ++v) {
          sums[r][v] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[r][v], _mm512_set1_epi32(four), (__m512i)fours[v]);
        }
      }
    }
#else
    for (int64_t r = 0; r < R; ++r) {
      for (int64_t k = 0; k < depth; ++k) {
        const int8_t* ones = weights + k / kInputs * kInputs * kOutputs + k % kInputs;
        for (int64_t j = 0; j < V * kLanes; ++j) sums[r][j / kLanes][j % kLanes] += x[r * depth + k] * ones[kInputs * j];
      }
    }
#endif
  }
};

}  // namespace specmpc
