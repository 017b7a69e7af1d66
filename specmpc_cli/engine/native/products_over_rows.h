// Products over rows, Σ left[row]ᵀ·right[row], of factors that are packed already (products.h): many at once, shared out evenly.

#pragma once

#include "bf16_product.h"
#include "fp32_product.h"

#include <ATen/Parallel.h>

namespace specmpc {

template <typename Product>
struct OverRows {
  const typename Product::Weight *left, *right;  // of `out` and of `in` features
  int64_t out, in;
  float* result;  // [out, in]
  bool adds;  // to what is there

  int64_t panels() const { return (in + Product::kOutputs - 1) / Product::kOutputs; }
  int64_t tiles() const { return (out + Product::kRows - 1) / Product::kRows; }

  // Some tiles of outputs with one panel of inputs.
  void compute(int64_t panel, int64_t first, int64_t some, int64_t depth) const {
    constexpr int64_t kDepth = 256;  // rows over which is summed at a time, so that a panel of them stays in a near cache
    const int64_t width = Product::right_width(in, panel), columns = std::min(width, in - panel * Product::kOutputs);
    const auto* panel_right = right + panel * Product::kOutputs * depth;
    for (int64_t from = 0; from < depth; from += kDepth) {
      const int64_t end = std::min(from + kDepth, depth);
      for (int64_t tile = first; tile < first + some; ++tile) {
        const auto* tile_left = left + tile * Product::kRows * depth;
        const int64_t outputs = std::min(Product::kRows, out - tile * Product::kRows);
        float* to = result + tile * Product::kRows * in + panel * Product::kOutputs;
        if (columns == width && outputs == Product::kRows) {
          Product::over_rows(tile_left, panel_right, width, from, end, to, in, adds || from > 0);
        } else if (from == 0) {  // at the edge: all rows at once, into a tile of its own
          alignas(64) float edge[Product::kRows * Product::kOutputs];
          Product::over_rows(tile_left, panel_right, width, 0, depth, edge, Product::kOutputs, false);
          for (int64_t o = 0; o < outputs; ++o) {
            const float* sums = edge + o * Product::kOutputs;
            for (int64_t c = 0; c < columns; ++c) to[o * in + c] = adds ? to[o * in + c] + sums[c] : sums[c];
          }
        }
      }
    }
  }
};

template <typename Product>
void multiply_over_rows(const std::vector<OverRows<Product>>& products, int64_t depth) {
  std::vector<int64_t> starts{0};  // in tiles, all of which are as much work
  for (const auto& product : products) starts.push_back(starts.back() + product.panels() * product.tiles());
  at::parallel_for(0, starts.back(), 1, [&](int64_t begin, int64_t end) {
    [[maybe_unused]] const typename Product::Session session;
    for (size_t p = 0; p < products.size(); ++p) {
      const int64_t from = std::max(begin, starts[p]) - starts[p], to = std::min(end, starts[p + 1]) - starts[p];
      if (from >= to) continue;
      for_runs(from, to, products[p].tiles(), [&](int64_t panel, int64_t first, int64_t some) {
        products[p].compute(panel, first, some, depth);
      });
    }
  });
}

}  // namespace specmpc
