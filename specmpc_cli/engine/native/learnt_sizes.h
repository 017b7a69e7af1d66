// The sizes of an MLP that learns, and where it keeps what its gradients need.

#pragma once

#include "bf16_product.h"
#include "fp32_product.h"
#include "row_ends.h"

#include <numeric>

namespace specmpc {

// What a forward pass keeps: what gradients of the inputs need, or also those of the parameters.
enum class Keep : int64_t { kNothing, kForInputs, kForParameters };

struct LearntLayer {
  int64_t number, in, out;
  bool normed;
  int64_t vectors, sums;  // where its vectors begin: among all vectors, and among all their elements
  int64_t inputs = 0, inverse_stds = 0, normed_rows = 0;  // where what is kept of it begins, in bytes

  int64_t own_vectors() const { return normed ? 3 : 1; }
};

// Of the inputs, from the first to the last whose gradient is wanted.
struct Columns {
  int64_t first, count;
};

// Features, and most of what is kept, are of the type that `Product` multiplies.
template <typename Product>
struct LearntSizes {
  using Feature = typename Product::Weight;

  std::vector<LearntLayer> layers;
  int64_t rows, groups, ends_in;
  Keep keep;
  int64_t depth;  // rows that are packed: with some of zeros
  int64_t sums = 0, widest = 0, kept_bytes = 0;  // all vectors' elements; the longest row; bytes

  LearntSizes(at::IntArrayRef dims, int64_t rows, int64_t groups, int64_t ends_in, Keep keep)
      : rows(rows), groups(groups), ends_in(ends_in), keep(keep), depth(padded(rows)) {
    int64_t vectors = 0;
    for (size_t l = 0; l + 1 < dims.size(); ++l) {
      const bool normed = l + 2 < dims.size() || ends_in != kPlain;
      const LearntLayer& layer = layers.emplace_back(LearntLayer{static_cast<int64_t>(l), dims[l], dims[l + 1], normed, vectors, sums});
      vectors += layer.own_vectors();
      sums += layer.own_vectors() * layer.out;
      const int64_t made = std::max(forth(layer).padded_outputs(), back(layer, {0, layer.in}).padded_outputs());
      widest = std::max({widest, padded(layer.in), padded(layer.out), made});
    }
    const auto take = [this](int64_t bytes) { return (kept_bytes += bytes) - bytes; };
    // Whole cache lines first, what needs no alignment last: there are no gaps.
    for (LearntLayer& layer : layers) {
      if (keep == Keep::kForParameters) layer.inputs = take(input_groups(layer) * Product::right_size(layer.in, depth) * sizeof(Feature));
    }
    for (LearntLayer& layer : layers) {
      if (keep != Keep::kNothing && layer.normed) layer.inverse_stds = take(groups * rows * sizeof(float));
    }
    for (LearntLayer& layer : layers) {
      if (keep != Keep::kNothing && layer.normed) layer.normed_rows = take(groups * rows * layer.out * sizeof(Feature));
    }
  }

  bool is_last(const LearntLayer& layer) const { return layer.number + 1 == static_cast<int64_t>(layers.size()); }
  bool ends_in_simnorm(const LearntLayer& layer) const { return is_last(layer) && ends_in > 0; }

  // Each layer's inputs packed as the right factor of its weights' gradient; all groups share those of the first.
  Feature* inputs(uint8_t* kept, const LearntLayer& layer, int64_t group) const {
    return reinterpret_cast<Feature*>(kept + layer.inputs) + group % input_groups(layer) * Product::right_size(layer.in, depth);
  }
  // A row as LayerNorm makes it before its weight and bias, and what it divided by.
  Feature* normed(uint8_t* kept, const LearntLayer& layer, int64_t group, int64_t row) const {
    return reinterpret_cast<Feature*>(kept + layer.normed_rows) + (group * rows + row) * layer.out;
  }
  float* inverse_std(uint8_t* kept, const LearntLayer& layer, int64_t group, int64_t row) const {
    return reinterpret_cast<float*>(kept + layer.inverse_stds) + group * rows + row;
  }

  static int64_t padded(int64_t size) { return round_up(size, Product::kInputs); }
  // A layer's product, and that of what its sums get of the gradient, for some of its inputs. Rows are padded with zeros.
  static Product forth(const LearntLayer& layer) { return {padded(layer.in), layer.out}; }
  static Product back(const LearntLayer& layer, const Columns& columns) { return {padded(layer.out), columns.count}; }

  // Rows that are taken through all layers at a time. Fixed, so that sums over them do not depend on the number of threads.
  static int64_t chunk_rows() {
    constexpr int64_t kSome = 64;
    return round_up(kSome, std::lcm(Product::kRows, Product::kInputs));
  }
  int64_t chunks() const { return (rows + chunk_rows() - 1) / chunk_rows(); }

 private:
  int64_t input_groups(const LearntLayer& layer) const { return layer.number ? groups : 1; }
};

}  // namespace specmpc
