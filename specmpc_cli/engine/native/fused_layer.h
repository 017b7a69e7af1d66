// A layer in one call: the product with the weights, a shift, and LayerNorm with an activation or neither.
//
// A thread takes a few dozen rows at a time through all of it, so that sums never leave a near cache: beside the product, what a layer
// computes costs little more than its arithmetic. Without gradients: what a backward pass would need is not kept.

#pragma once

#include "products.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <numeric>
#include <optional>
#include <vector>

namespace specmpc {

// What follows a layer's product. `softmax_size`: 0 for Mish, else SimNorm's, so many neighbouring features.
struct Epilogue {
  PerGroup shift;
  std::optional<PerGroup> weight, bias;  // LayerNorm's; without them there is neither norm nor activation
  int64_t softmax_size, dim;

  // A row of sums, which it may overwrite, of one group → y.
  template <typename T>
  void write(float* sums, int64_t in_group, T* y) const {
    const float* c = shift.of(in_group);
    if (!weight) {
#pragma omp simd
      for (int64_t j = 0; j < dim; ++j) y[j] = from_float<T>(sums[j] + c[j]);
      return;
    }
    const float *w = weight->of(in_group), *b = bias->of(in_group);
    if (softmax_size == 0) return norm_mish_row(sums, c, w, b, dim, y);
    const Moments found = moments(sums, c, dim);
    const float mean = found.mean, inverse_std = found.inverse_std;
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) sums[j] = (sums[j] + c[j] - mean) * inverse_std * w[j] + b[j];
    if (softmax_size == 8) {
      softmax<8>(sums, y, softmax_size);  // TD-MPC2's: known to the compiler, a group is one or two vectors
    } else {
      softmax<0>(sums, y, softmax_size);
    }
  }

  // Over each group of neighbouring features.
  template <int64_t known, typename T>
  void softmax(float* x, T* y, int64_t given) const {
    const int64_t size = known ? known : given;
    const auto in_group = [size](const float* values, auto combine) {  // pairwise, which a processor does side by side
      if constexpr (known == 8) {
        const float* v = values;
        return combine(combine(combine(v[0], v[4]), combine(v[2], v[6])), combine(combine(v[1], v[5]), combine(v[3], v[7])));
      } else {
        return std::accumulate(values + 1, values + size, values[0], combine);
      }
    };
    for (int64_t first = 0; first < dim; first += size) {
      const float most = in_group(x + first, [](float a, float b) { return a > b ? a : b; });
      for (int64_t j = 0; j < size; ++j) x[first + j] -= most;
    }
#pragma omp simd
    for (int64_t j = 0; j < dim; ++j) x[j] = exp_for_mish(x[j]);
    for (int64_t first = 0; first < dim; first += size) {
      const float inverse = 1.0f / in_group(x + first, [](float a, float b) { return a + b; });
      for (int64_t j = 0; j < size; ++j) y[first + j] = from_float<T>(x[first + j] * inverse);
    }
  }
};

template <typename Product>
at::Tensor pack_for(const Rows& weight, bool grouped, const std::optional<at::Tensor>& into) {
  using Weight = typename Product::Weight;
  const Product product(weight.dim, weight.count);
  const int64_t size = product.packed_size(), panels = product.panels();
  const std::vector<int64_t> shape = grouped ? std::vector<int64_t>{weight.groups, size} : std::vector<int64_t>{size};
  const at::Tensor packed = into ? *into : at::empty(shape, weight.x.options());
  const bool fits = packed.sizes() == at::IntArrayRef(shape) && packed.scalar_type() == weight.x.scalar_type() && packed.is_contiguous();
  TORCH_CHECK(fits, "pack_weights: other weights were packed there");
  Weight* to = packed.data_ptr<Weight>();
  at::parallel_for(0, weight.groups * panels, std::max<int64_t>(1, kGrain / weight.dim), [&](int64_t begin, int64_t end) {
    for_runs(begin, end, panels, [&](int64_t group, int64_t first, int64_t some) {
      for (int64_t panel = first; panel < first + some; ++panel) {
        product.pack(weight.of<Weight>(group), weight.step, panel, to + group * size);
      }
    });
  });
  return packed;
}

// Weights [out, in] or [G, out, in] → packed, [size] or [G, size]; into what was packed before, if that is given.
inline at::Tensor pack_weights(const at::Tensor& weight, const std::optional<at::Tensor>& into) {
  TORCH_CHECK(weight.dim() == 2 || weight.dim() == 3, "pack_weights: weights have two axes, or three with groups");
  TORCH_CHECK(weight.numel() > 0, "pack_weights: no weights");
  const Rows rows(weight);
  const bool grouped = weight.dim() == 3;
  if (weight.scalar_type() == at::kBFloat16) return pack_for<Bf16Product>(rows, grouped, into);
  TORCH_CHECK(weight.scalar_type() == at::kFloat, "pack_weights: weights must be fp32 or bf16");
  return pack_for<Fp32Product>(rows, grouped, into);
}

// x [G, N, in - skipped], packed [G, size] → y [G, N, out]; either may have one group for all.
template <typename Product, typename Input, typename Output>
void layer_rows(const Rows& x, int64_t in_dim, const at::Tensor& packed, const Epilogue& epilogue, const Rows& y) {
  using Weight = typename Product::Weight;
  const Product product(in_dim, y.dim);
  TORCH_CHECK(packed.size(-1) == product.packed_size(), "fused_layer: weights packed for other sizes");
  const int64_t packed_groups = packed.numel() / packed.size(-1), step = packed_groups == 1 ? 0 : packed.size(-1);
  TORCH_CHECK(packed_groups == 1 || packed_groups == y.groups, "fused_layer: weights for other groups");
  const Weight* weights = packed.const_data_ptr<Weight>();
  const int64_t tiles = (y.count + Product::kRows - 1) / Product::kRows;
  at::parallel_for(0, y.groups * tiles, std::max<int64_t>(1, kGrain / y.dim / Product::kRows), [&](int64_t begin, int64_t end) {
    static thread_local Scratch<float> scratch;
    float* sums = scratch.at_least(Product::kBlockRows * product.padded_outputs());
    for_runs(begin, end, tiles, [&](int64_t group, int64_t first_tile, int64_t some) {
      const int64_t first = first_tile * Product::kRows, end_row = std::min(first + some * Product::kRows, y.count);
      const Input* from = x.of<Input>(x.groups == 1 ? 0 : group, first);
      Output* to = y.of<Output>(group, first);
      for (int64_t row = first; row < end_row; row += Product::kBlockRows) {
        const int64_t count = std::min(Product::kBlockRows, end_row - row);
        product.multiply(from, x.step, count, in_dim - x.dim, weights + group * step, sums);
        for (int64_t r = 0; r < count; ++r) epilogue.write(sums + r * product.padded_outputs(), group, to + r * y.step);
        from += count * x.step;
        to += count * y.step;
      }
    });
  });
}

// x [N, in] or [G, N, in], fp32 or bf16; packed weights [size] or [G, size], made from [out, in_dim]; shift and LayerNorm's vectors [out] or
// [G, out]. → [N, out] or [G, N, out]. The product is computed in the weights' dtype, what follows in fp32; after Mish the result is of
// that dtype, else fp32. Where x has fewer features than in_dim, they are the last ones; the shift has what the others contribute.
inline at::Tensor fused_layer(
    const at::Tensor& x,
    const at::Tensor& packed,
    int64_t in_dim,
    const at::Tensor& shift,
    const std::optional<at::Tensor>& norm_weight,
    const std::optional<at::Tensor>& norm_bias,
    int64_t softmax_size) {
  TORCH_CHECK(x.dim() == 2 || x.dim() == 3, "fused_layer: rows have two axes, or three with groups");
  TORCH_CHECK(packed.dim() <= 2 && packed.is_contiguous(), "fused_layer: weights are not packed");
  TORCH_CHECK(norm_weight.has_value() == norm_bias.has_value(), "fused_layer: a norm has a weight and a bias");
  TORCH_CHECK(x.size(-1) > 0 && shift.size(-1) > 0, "fused_layer: no features");
  const Rows in(x);
  const int64_t groups = std::max(in.groups, packed.dim() == 2 ? packed.size(0) : 1), out = shift.size(-1);
  TORCH_CHECK(in.groups == 1 || in.groups == groups, "fused_layer: weights for ", groups, " groups, rows of ", in.groups);
  TORCH_CHECK(in.dim <= in_dim, "fused_layer: rows of ", in.dim, " features, weights for ", in_dim);
  const bool in_groups = softmax_size == 0 || (softmax_size > 0 && out % softmax_size == 0);
  TORCH_CHECK(in_groups, "fused_layer: ", out, " features are not groups of ", softmax_size);
  const bool half = packed.scalar_type() == at::kBFloat16, mish_follows = norm_weight.has_value() && softmax_size == 0;
  std::vector<int64_t> shape{in.count, out};
  if (x.dim() == 3 || packed.dim() == 2) shape.insert(shape.begin(), groups);
  at::Tensor y = at::empty(shape, x.options().dtype(half && mish_follows ? at::kBFloat16 : at::kFloat));
  Epilogue epilogue{PerGroup(shift, groups, out), std::nullopt, std::nullopt, softmax_size, out};
  if (norm_weight) {
    epilogue.weight.emplace(*norm_weight, groups, out);
    epilogue.bias.emplace(*norm_bias, groups, out);
  }
  const Rows to(y);
  if (!half) {
    TORCH_CHECK(x.scalar_type() == at::kFloat && packed.scalar_type() == at::kFloat, "fused_layer: rows and weights must be fp32 or bf16");
    layer_rows<Fp32Product, float, float>(in, in_dim, packed, epilogue, to);
    return y;
  }
  for_type_of(in.x, [&](auto typed) {
    if (mish_follows) {
      layer_rows<Bf16Product, decltype(typed), at::BFloat16>(in, in_dim, packed, epilogue, to);
    } else {
      layer_rows<Bf16Product, decltype(typed), float>(in, in_dim, packed, epilogue, to);
    }
  });
  return y;
}

}  // namespace specmpc
