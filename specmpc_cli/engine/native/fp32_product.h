// Products in fp32 (products.h).

#pragma once

#include "products.h"

namespace specmpc {

// A tile of kRows × kOutputs sums stays in registers while the inputs pass.
class Fp32Product {
 public:
  using Weight = float;
  using Features = PlainFeatures<float>;

#if defined(__AVX512F__)
  static constexpr int64_t kLanes = 16, kRows = 12;
#elif defined(__AVX__)
  static constexpr int64_t kLanes = 8, kRows = 6;
#else
  static constexpr int64_t kLanes = 4, kRows = 6;
#endif
  static constexpr int64_t kVectors = 2, kOutputs = kLanes * kVectors;
  static constexpr int64_t kInputs = 1;  // that are multiplied at once
  static constexpr bool kRough = false;  // whether its inputs are rounded, so that what makes them need not be exact

  struct Session {};  // what a thread must hold while it multiplies over rows

  Fp32Product(int64_t in, int64_t out, Care = {}) : in_(in), out_(out) {}

  int64_t padded_outputs() const { return round_up(out_, kLanes); }
  int64_t panels() const { return (out_ + kOutputs - 1) / kOutputs; }
  int64_t packed_size() const { return right_size(out_, in_); }

  // weight: rows of in_ inputs, `step` apart. Within a panel, an input's weights for all outputs lie side by side.
  void pack(const float* weight, int64_t step, int64_t panel, float* packed) const {
    const int64_t first = panel * kOutputs, width = right_width(out_, panel), real = std::min(width, out_ - first);
    for (int64_t from = 0; from < in_; from += kBlock) {
      const int64_t inputs = std::min(kBlock, in_ - from);
      for (int64_t lane = 0; lane < width; lane += kBlock) {
        const int64_t outputs = std::min(kBlock, width - lane);
        alignas(64) FourBytes block[kBlock][kBlock] = {};
        for (int64_t j = 0; j < std::min(outputs, real - lane); ++j) copy(weight + (first + lane + j) * step + from, inputs, block[j]);
        transpose(block);
        float* to = packed + first * in_ + from * width + lane;
        for (int64_t k = 0; k < inputs; ++k) copy(block[k], outputs, to + k * width);
      }
    }
  }

  // `count` rows, `step` apart, of all inputs but the first `skipped` → sums [count, padded_outputs()].
  void multiply(const float* x, int64_t step, int64_t count, int64_t skipped, const float* packed, float* sums) const {
    const int64_t passes = (in_ - skipped + kDepth - 1) / kDepth, even = (in_ - skipped + passes - 1) / passes;
    for (int64_t from = skipped; from < in_; from += even) {  // so many inputs that a panel of their weights stays in a near cache
      const int64_t depth = std::min(even, in_ - from);
      for (int64_t panel = 0; panel < panels(); ++panel) {
        const int64_t first = panel * kOutputs, width = right_width(out_, panel);
        const float* weights = packed + first * in_ + from * width;
        for (int64_t r = 0; r < count; r += kRows) {
          float* to = sums + r * padded_outputs() + first;
          const float* rows = x + r * step + (from - skipped);
          const auto at = [rows, step](int64_t row, int64_t k) { return rows[row * step + k]; };
          const int64_t some = std::min(kRows, count - r);
          if (width == kOutputs) {
            tile_of<kVectors>(some, at, depth, weights, to, padded_outputs(), from > skipped);
          } else {
            tile_of<1>(some, at, depth, weights, to, padded_outputs(), from > skipped);
          }
        }
      }
    }
  }
  // Inputs that another layer makes, row by row.
  template <typename Make>
  void take(Features& features, int64_t r, Make make) const {
    make(features.rows + r * in_);
  }
  void multiply(const Features& features, int64_t count, const float* packed, float* sums) const {
    multiply(features.rows, in_, count, 0, packed, sums);
  }

  // Products over `depth` rows. Both factors are packed: the left one in tiles of kRows of its features, the right one as a weight whose
  // inputs are the rows.
  static int64_t left_size(int64_t dim, int64_t depth) { return round_up(dim, kRows) * depth; }
  static int64_t right_size(int64_t dim, int64_t depth) { return round_up(dim, kLanes) * depth; }
  static int64_t right_width(int64_t dim, int64_t panel) { return std::min(kOutputs, round_up(dim, kLanes) - panel * kOutputs); }

  // `count` rows of `dim` features, `step` apart, the first of which is number `first` of `depth`.
  static void pack_left(const float* rows, int64_t step, int64_t count, int64_t dim, int64_t first, int64_t depth, float* packed) {
    for (int64_t from = 0; from < dim; from += kRows) {
      float* to = packed + from * depth + first * kRows;
      const int64_t some = std::min(kRows, dim - from);
      for (int64_t r = 0; r < count; ++r) {
        std::copy_n(rows + r * step + from, some, to + r * kRows);
        std::fill(to + r * kRows + some, to + (r + 1) * kRows, 0.0f);
      }
    }
  }
  static void pack_right(const float* rows, int64_t step, int64_t count, int64_t dim, int64_t first, int64_t depth, float* packed) {
    for (int64_t from = 0; from < dim; from += kOutputs) {
      const int64_t width = right_width(dim, from / kOutputs), some = std::min(width, dim - from);
      float* to = packed + from * depth + first * width;
      for (int64_t r = 0; r < count; ++r) {
        std::copy_n(rows + r * step + from, some, to + r * width);
        std::fill(to + r * width + some, to + (r + 1) * width, 0.0f);
      }
    }
  }

  // One tile of the left factor and one panel of the right, `width` wide, rows `from` to `end` → sums [kRows, width], `step` apart;
  // `add`: to what is there.
  static void over_rows(
      const float* left, const float* right, int64_t width, int64_t from, int64_t end, float* sums, int64_t step, bool add) {
    const float* first = left + from * kRows;
    const auto at = [first](int64_t row, int64_t k) { return first[k * kRows + row]; };
    if (width == kOutputs) {
      tile<kVectors, kRows>(at, end - from, right + from * width, sums, step, add);
    } else {
      tile<1, kRows>(at, end - from, right + from * width, sums, step, add);
    }
  }

 private:
  static constexpr int64_t kDepth = 512;
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

  int64_t in_, out_;

  // Up to kBlock values.
  static void copy(const void* from, int64_t count, void* to) {
    if (count == kBlock) {
      std::memcpy(to, from, kBlock * sizeof(float));
    } else {
      std::memcpy(to, from, count * sizeof(float));
    }
  }

  // A tile of up to kRows rows and V vectors of outputs; `at` has a row's input. → sums, rows `step` apart.
  template <int V, int R = kRows, typename At>
  static void tile_of(int64_t rows, At at, int64_t depth, const float* weights, float* sums, int64_t step, bool add) {
    if constexpr (R > 1) {
      if (rows < R) return tile_of<V, R - 1>(rows, at, depth, weights, sums, step, add);
    }
    tile<V, R>(at, depth, weights, sums, step, add);
  }

  template <int V, int R, typename At>
  static void tile(At at, int64_t depth, const float* weights, float* sums, int64_t step, bool add) {
    Vector sum[R][V] = {};
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
      Vector weight[V];
      for (int v = 0; v < V; ++v) weight[v] = *reinterpret_cast<const Vector*>(weights + (k * V + v) * kLanes);
      for (int r = 0; r < R; ++r) {
        const float value = at(r, k);
        for (int v = 0; v < V; ++v) sum[r][v] += value * weight[v];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        Vector* to = reinterpret_cast<Vector*>(sums + r * step + v * kLanes);
        *to = add ? *to + sum[r][v] : sum[r][v];
      }
    }
  }
};

}  // namespace specmpc
