// An MLP in one call: layers with LayerNorm and Mish between products, and a last layer that is plain, or has LayerNorm and Mish or SimNorm,
// or whose outputs are decoded.
//
// A thread takes some rows at a time through all layers, so that sums and features never leave a near cache: beside the products, what a
// layer computes costs little more than its arithmetic. Without gradients: what a backward pass would need is not kept.

#pragma once

#include "bf16_product.h"
#include "fp32_product.h"
#include "int8_product.h"
#include "row_ends.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <limits>
#include <numeric>
#include <optional>
#include <vector>

namespace specmpc {

// As pack_mlp, which has looked at the weights: of type Given.
template <typename Product, typename Given>
at::Tensor pack_for(
    const std::vector<Rows>& weights, const at::TensorOptions& options, bool grouped, const std::optional<at::Tensor>& into) {
  using Weight = typename Product::Weight;
  int64_t size = 0;
  for (const Rows& weight : weights) size += Product(weight.dim, weight.count).packed_size();
  const int64_t groups = weights[0].groups;
  const std::vector<int64_t> shape = grouped ? std::vector<int64_t>{groups, size} : std::vector<int64_t>{size};
  const auto type = c10::CppTypeToScalarType<Weight>::value;
  const at::Tensor packed = into ? *into : at::empty(shape, options.dtype(type));
  const bool alike = packed.sizes() == at::IntArrayRef(shape) && packed.scalar_type() == type;
  TORCH_CHECK(alike && packed.is_contiguous(), "pack_mlp: other weights were packed there");
  Weight* to = packed.data_ptr<Weight>();
  for (const Rows& weight : weights) {
    const Product product(weight.dim, weight.count);
    const int64_t panels = product.panels();
    at::parallel_for(0, groups * panels, std::max<int64_t>(1, kGrain / weight.dim), [&](int64_t begin, int64_t end) {
      for_runs(begin, end, panels, [&](int64_t group, int64_t first, int64_t some) {
        for (int64_t panel = first; panel < first + some; ++panel) {
          product.pack(weight.of<Given>(group), weight.step, panel, to + group * size);
        }
      });
    });
    to += product.packed_size();
  }
  return packed;
}

// The layers' weights, each [out, in] or each [G, out, in] → packed, [size] or [G, size]; into what was packed before, if that is given:
// then fp32 weights take its type. `int8`: rounds fp32 weights to 8 bits, with which products are computed then.
inline at::Tensor pack_mlp(at::TensorList weights, bool int8, const std::optional<at::Tensor>& into) {
  TORCH_CHECK(!weights.empty(), "pack_mlp: no weights");
  const at::ScalarType type = weights[0].scalar_type();
  const int64_t axes = weights[0].dim();
  std::vector<Rows> rows;
  for (const at::Tensor& weight : weights) {
    TORCH_CHECK(weight.dim() == 2 || weight.dim() == 3, "pack_mlp: weights have two axes, or three with groups");
    TORCH_CHECK(weight.numel() > 0, "pack_mlp: no weights");
    const bool alike = weight.scalar_type() == type && weight.dim() == axes;
    TORCH_CHECK(alike && (axes == 2 || weight.size(0) == weights[0].size(0)), "pack_mlp: weights of different kinds");
    TORCH_CHECK(rows.empty() || weight.size(-1) == rows.back().count, "pack_mlp: a layer's inputs are the outputs of the one before");
    rows.emplace_back(weight);
  }
  const at::TensorOptions options = weights[0].options();
  if (int8) {
    TORCH_CHECK(type == at::kFloat, "pack_mlp: weights that are rounded to 8 bits must be fp32");
    for (const Rows& weight : rows) TORCH_CHECK(weight.dim <= Int8Product::kMostInputs, "pack_mlp: sums of ", weight.dim, " inputs");
    return pack_for<Int8Product, float>(rows, options, axes == 3, into);
  }
  if (type == at::kBFloat16) return pack_for<Bf16Product, at::BFloat16>(rows, options, axes == 3, into);
  TORCH_CHECK(type == at::kFloat, "pack_mlp: weights must be fp32 or bf16");
  if (into && into->scalar_type() == at::kBFloat16) return pack_for<Bf16Product, float>(rows, options, axes == 3, into);
  return pack_for<Fp32Product, float>(rows, options, axes == 3, into);
}

// Weights and vectors of one group, layer by layer.
template <typename Product>
class Layers {
 public:
  using Weight = typename Product::Weight;

  // `vectors` of a layer: what is added to the product; of all but a plain last layer LayerNorm's weight and bias, too.
  // `apart`: how many of the first layer's inputs are of another kind than those after them.
  Layers(at::IntArrayRef dims, int64_t apart, int64_t ends_in, const std::optional<Bins>& bins)
      : dims_(dims.vec()), ends_in_(ends_in), bins_(bins) {
    for (size_t layer = 0; layer + 1 < dims.size(); ++layer) {
      products_.emplace_back(dims[layer], dims[layer + 1], Care{layer == 0 ? apart : 0, is_last(layer) && ends_in == kPlain});
      widest_ = std::max(widest_, products_.back().padded_outputs());
      weights_ += products_.back().packed_size();
      vectors_ += vectors_of(layer) * dims[layer + 1];
    }
  }

  int64_t weights() const { return weights_; }
  int64_t vectors() const { return vectors_; }
  int64_t dim(size_t layer) const { return dims_[layer]; }

  // What one row of the leading `skipped` inputs, followed by zeros, adds to the first layer's outputs, the bias included.
  std::vector<float> shift(const float* shared, int64_t skipped, const Weight* weight, const float* vector) const {
    const Product& first = products_[0];
    std::vector<float> row(dims_[0]), sums(Product::kRows * first.padded_outputs());
    std::copy_n(shared, skipped, row.begin());
    first.multiply(row.data(), row.size(), 1, 0, weight, sums.data());
    for (int64_t j = 0; j < dims_[1]; ++j) sums[j] += vector[j];
    return sums;
  }

  // What rows are multiplied with; `shift` has what is added to the first product, for rows that lack the first `skipped` inputs.
  struct Values {
    const Weight* weights;
    const float *vectors, *shift = vectors;
    int64_t skipped = 0;
  };

  // `count` rows x, `step` apart → y, rows of the last layer's outputs, `y_step` apart, or what is expected of each. If they are as far
  // apart as the rows, they may take their place.
  struct Passing {
    const float* x;
    int64_t step, count;
    float* y;
    int64_t y_step;
  };

  void compute(const Passing& rows, const Values& values) const {
    const int64_t some = block_rows();
    for (int64_t r = 0; r < rows.count; r += some) {
      compute_block({rows.x + r * rows.step, rows.step, std::min(some, rows.count - r), rows.y + r * rows.y_step, rows.y_step}, values);
    }
  }

 private:
  std::vector<int64_t> dims_;
  std::vector<Product> products_;
  int64_t ends_in_, widest_ = 0, weights_ = 0, vectors_ = 0;
  std::optional<Bins> bins_;

  bool is_last(size_t layer) const { return layer + 2 == dims_.size(); }
  int64_t vectors_of(size_t layer) const { return is_last(layer) && ends_in_ == kPlain ? 1 : 3; }

  // Rows that are taken through all layers at a time: so few that with their sums they stay in the second cache, beside weights of a
  // moderate size; larger ones are better read less often.
  int64_t block_rows() const {
    constexpr int64_t kFew = 64, kModerate = 1 << 20;
    return round_up(weights_ * sizeof(Weight) > kModerate ? 2 * kFew : kFew, Product::kRows);
  }

  void compute_block(const Passing& rows, const Values& values) const {
    const int64_t count = rows.count;
    const Weight* weight = values.weights;
    const float *vector = values.vectors, *shift = values.shift;
    static thread_local Scratch<float> sums_scratch;
    float* sums = sums_scratch.at_least(block_rows() * widest_);
    typename Product::Features features(block_rows(), widest_);
    for (size_t layer = 0; layer < products_.size(); ++layer) {
      const Product& product = products_[layer];
      const int64_t dim = dims_[layer + 1], sums_step = product.padded_outputs();
      if (layer == 0) {
        product.multiply(rows.x, rows.step, count, values.skipped, weight, sums);
      } else {
        product.multiply(features, count, weight, sums);
        shift = vector;
      }
      const auto row_of = [=](int64_t r) { return sums + r * sums_step; };
      const auto y_of = [&rows](int64_t r) { return rows.y + r * rows.y_step; };
      if (is_last(layer) && ends_in_ == kPlain) {
        for (int64_t r = 0; r < count; ++r) end_row(row_of(r), shift, dim, y_of(r));
        return;
      }
      const float *norm_weight = vector + dim, *norm_bias = norm_weight + dim;
      for (int64_t first = 0; first < count; first += kTogether) {
        const int64_t end = std::min(first + kTogether, count);
        Moments found[kTogether];
        for (int64_t r = first; r < end; ++r) found[r - first] = shifted<Product::kRough>(row_of(r), shift, dim);
        for (int64_t r = first; r < end; ++r) {
          const Moments& own = found[r - first];
          if (is_last(layer) && ends_in_ == kMish) {
            mish_row(row_of(r), own, norm_weight, norm_bias, dim, y_of(r));
          } else if (is_last(layer)) {
            norm_softmax_row<Product::kRough>(row_of(r), own, norm_weight, norm_bias, dim, ends_in_, y_of(r));
          } else {
            products_[layer + 1].take(features, r, [&](auto made) { mish_row(row_of(r), own, norm_weight, norm_bias, dim, made); });
          }
        }
      }
      weight += product.packed_size();
      vector += vectors_of(layer) * dim;
    }
  }

  // A row of a plain last layer's sums → its outputs, or what is expected of them.
  void end_row(float* row, const float* shift, int64_t dim, float* y) const {
    if (bins_) {
      *y = bins_->template expected<Product::kRough>(row, shift);
      return;
    }
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) y[j] = row[j] + shift[j];
  }
};

// Each group's weights and vectors.
struct Heads {
  const at::Tensor &packed, &vectors;
  std::vector<int64_t> of_group;

  template <typename Weight>
  const Weight* weights(int64_t group) const {
    return packed.const_data_ptr<Weight>() + of_group[group] * packed.size(-1);
  }
  const float* vector(int64_t group) const { return vectors.const_data_ptr<float>() + of_group[group] * vectors.size(-1); }
};

// `shared`: the leading inputs, which all rows of a group have in common, if `x` lacks them. Threads share the tiles of the first layer.
template <typename Product>
void compute_mlp(const Rows& x, const std::optional<Rows>& shared, const Heads& heads, const Layers<Product>& layers, const Rows& y) {
  using Weight = typename Product::Weight;
  const bool fits = heads.packed.size(-1) == layers.weights() && heads.vectors.size(-1) == layers.vectors();
  TORCH_CHECK(fits, "fused_mlp: weights packed for other sizes");
  const int64_t skipped = shared ? shared->dim : 0;
  const auto row_of = [](const Rows& rows, int64_t group, int64_t row) { return rows.of<float>(rows.groups == 1 ? 0 : group, row); };
  std::vector<std::vector<float>> shifts;  // of the first layer, with what the shared inputs contribute
  for (int64_t group = 0; shared && group < y.groups; ++group) {
    shifts.push_back(layers.shift(row_of(*shared, group, 0), skipped, heads.weights<Weight>(group), heads.vector(group)));
  }
  const int64_t tiles = (y.count + Product::kRows - 1) / Product::kRows;
  at::parallel_for(0, y.groups * tiles, std::max<int64_t>(1, kGrain / layers.dim(1) / Product::kRows), [&](int64_t begin, int64_t end) {
    for_runs(begin, end, tiles, [&](int64_t group, int64_t first_tile, int64_t some) {
      const int64_t row = first_tile * Product::kRows, count = std::min(some * Product::kRows, y.count - row);
      const float *vectors = heads.vector(group), *shift = shared ? shifts[group].data() : vectors;
      const float* from = row_of(x, group, row);
      layers.compute({from, x.step, count, y.of<float>(group, row), y.step}, {heads.weights<Weight>(group), vectors, shift, skipped});
    });
  });
}

// `heads` [G], each below `known`.
inline std::vector<int64_t> picked_heads(const at::Tensor& heads, int64_t known) {
  TORCH_CHECK(heads.scalar_type() == at::kLong && heads.dim() == 1 && heads.numel() > 0, "specmpc: heads are int64, one for each group");
  const at::Tensor picked = heads.contiguous();
  const std::vector<int64_t> found(picked.const_data_ptr<int64_t>(), picked.const_data_ptr<int64_t>() + picked.numel());
  for (const int64_t head : found) TORCH_CHECK(head >= 0 && head < known, "specmpc: head ", head, " of ", known);
  return found;
}

// Rows x [N, I] or [G, N, I] through layers of these `dims`, the first of which has I inputs; or more, when `shared` [1, S] or [G, 1, S]
// has the leading ones, which all rows have in common. `packed` is pack_mlp's, [size] or [E, size]; `vectors` [V] or [E, V] are, for each
// layer, what is added to the product and, if it has a norm, LayerNorm's weight and bias. `ends_in`: how the last layer ends
// (row_ends.h). `apart`: how many leading inputs are of another kind than those after them, which int8 rounds apart. `range` [2]: the
// plain last layer's outputs are logits of bins from here to there, and their expected scalar is the result. `heads` [G]: which of the E
// each group takes; all in turn, if left out. → [N, out] or [G, N, out], or with a range [N] or [G, N]. Rows, vectors and results are fp32;
// products are computed in the weights' dtype, as are the features between layers.
inline at::Tensor fused_mlp(
    const at::Tensor& x,
    const std::optional<at::Tensor>& shared,
    const at::Tensor& packed,
    const at::Tensor& vectors,
    at::IntArrayRef dims,
    int64_t ends_in,
    int64_t apart,
    std::optional<at::ArrayRef<double>> range,
    const std::optional<at::Tensor>& heads) {
  const auto is_rows = [](const at::Tensor& rows) { return (rows.dim() == 2 || rows.dim() == 3) && rows.size(-1) > 0; };
  TORCH_CHECK(is_rows(x) && (!shared || is_rows(*shared)), "fused_mlp: rows have two axes, or three with groups, and features");
  const bool floats = x.scalar_type() == at::kFloat && vectors.scalar_type() == at::kFloat;
  TORCH_CHECK(floats && (!shared || shared->scalar_type() == at::kFloat), "fused_mlp: rows and vectors must be fp32");
  const bool alike = packed.dim() == vectors.dim() && (packed.dim() == 1 || (packed.dim() == 2 && packed.size(0) == vectors.size(0)));
  TORCH_CHECK(alike && packed.is_contiguous() && vectors.is_contiguous(), "fused_mlp: weights are not packed, or have other vectors");
  TORCH_CHECK(dims.size() >= 2 && *std::min_element(dims.begin(), dims.end()) > 0, "fused_mlp: no layers");
  TORCH_CHECK(can_end_in(ends_in, dims.back()), "fused_mlp: ", dims.back(), " features are not groups of ", ends_in);
  std::optional<Bins> bins;
  if (range) {
    TORCH_CHECK(range->size() == 2 && ends_in == kPlain && dims.back() > 1, "fused_mlp: a range is of bins, from the first to the last");
    bins.emplace(dims.back(), (*range)[0], (*range)[1]);
  }
  const Rows in(x);
  const std::optional<Rows> in_common = shared ? std::make_optional<Rows>(*shared) : std::nullopt;
  const int64_t features = in.dim + (shared ? in_common->dim : 0);
  TORCH_CHECK(features == dims[0], "fused_mlp: rows of ", features, " features, weights for ", dims[0]);
  TORCH_CHECK(!shared || in_common->count == 1, "fused_mlp: shared inputs are one row");

  const int64_t known = packed.dim() == 2 ? packed.size(0) : 1;
  std::vector<int64_t> of_group(known);
  std::iota(of_group.begin(), of_group.end(), 0);
  if (heads) of_group = picked_heads(*heads, known);
  const int64_t given = of_group.size(), groups = std::max({in.groups, shared ? in_common->groups : 1, given});
  const auto serves = [groups](int64_t count) { return count == 1 || count == groups; };
  const bool match = serves(given) && serves(in.groups) && (!shared || serves(in_common->groups));
  TORCH_CHECK(match, "fused_mlp: ", groups, " groups; weights for ", given, ", rows of ", in.groups, ", shared inputs of another number");
  of_group.resize(groups, of_group[0]);

  std::vector<int64_t> shape{in.count, dims.back()};
  if (groups > 1 || x.dim() == 3 || packed.dim() == 2) shape.insert(shape.begin(), groups);
  if (bins) shape.back() = 1;
  at::Tensor y = at::empty(shape, x.options());
  const Heads found{packed, vectors, std::move(of_group)};
  if (packed.scalar_type() == at::kBFloat16) {
    compute_mlp(in, in_common, found, Layers<Bf16Product>(dims, apart, ends_in, bins), Rows(y));
  } else if (packed.scalar_type() == at::kChar) {
    compute_mlp(in, in_common, found, Layers<Int8Product>(dims, apart, ends_in, bins), Rows(y));
  } else {
    TORCH_CHECK(packed.scalar_type() == at::kFloat, "fused_mlp: weights must be fp32, bf16 or int8");
    compute_mlp(in, in_common, found, Layers<Fp32Product>(dims, apart, ends_in, bins), Rows(y));
  }
  return bins ? y.squeeze(-1) : y;
}

}  // namespace specmpc
