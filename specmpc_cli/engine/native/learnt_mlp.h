// An MLP that learns: one call forwards, one backwards.
//
// As in fused_mlp.h a thread takes some rows at a time through all layers, forwards and back, so that what lies between products happens in
// a near cache. On the way it packs what gradients of weights are products of: features, and the gradients of sums.

#pragma once

#include "fused_mlp.h"
#include "learnt_rows.h"
#include "learnt_sizes.h"
#include "products_over_rows.h"

#include <ATen/ops/zeros.h>

namespace specmpc {

// What the layers are made of, for each group of rows: the same for all, or a head of E.
struct Parameters {
  std::vector<Rows> weights;  // [out, in] or [E, out, in]
  std::vector<PerGroup> vectors;  // of each layer its bias and, where it has a norm, LayerNorm's weight and bias: [out] or [E, out]
  std::vector<int64_t> heads;  // of each group

  const float* weight(const LearntLayer& layer, int64_t group, int64_t row = 0) const {
    return weights[layer.number].of<float>(heads[group], row);
  }
  const float* vector(const LearntLayer& layer, int64_t which, int64_t group) const {
    return vectors[layer.vectors + which].of(heads[group]);
  }
};

// Some features of the inputs [N, I], and the gradient that they get, if one is wanted.
struct Part {
  Rows values;
  std::optional<Rows> gradient;
  bool adds = false;  // to what is there
};

// Which features of the first layer, counted through [G, N, D], are zero, in rising order; the others are multiplied by `kept`.
struct Dropout {
  at::Tensor zeros;
  int64_t rows, dim;
  float kept;

  // The factors of one row's features; until the next call.
  const float* factors(int64_t group, int64_t row) const {
    static thread_local Scratch<float> scratch;
    float* factor = scratch.at_least(dim);
    std::fill_n(factor, dim, kept);
    const int64_t first = (group * rows + row) * dim;
    const int64_t *begin = zeros.const_data_ptr<int64_t>(), *end = begin + zeros.numel();
    for (const int64_t* zero = std::lower_bound(begin, end, first); zero < end && *zero < first + dim; ++zero) factor[*zero - first] = 0.0f;
    return factor;
  }
};

// What both passes are given.
struct LearntInputs {
  std::vector<Part> parts;
  Parameters given;
  std::optional<Dropout> dropout;
};

// Some rows of a group.
struct Block {
  int64_t group, first, count;
};

// Products are computed in the type that `Product` multiplies; features and what is kept are of it, and all else is fp32.
template <typename Product>
class LearntMlp {
 public:
  using Feature = typename Product::Weight;
  using Sizes = LearntSizes<Product>;

  LearntMlp(const Sizes& sizes, const LearntInputs& inputs, uint8_t* kept)
      : sizes_(sizes),
        parts_(inputs.parts),
        given_(inputs.given),
        dropout_(inputs.dropout),
        kept_(kept),
        wanted_(wanted_columns(inputs.parts)) {}

  // `packed` is packed_forth's, of these weights → y [G, N, out], and what is kept.
  void forward(const at::Tensor& packed, const Rows& y) const {
    const int64_t chunks = sizes_.chunks();
    at::parallel_for(0, sizes_.groups * chunks, 1, [&](int64_t begin, int64_t end) {
      for_runs(begin, end, chunks, [&](int64_t group, int64_t first, int64_t some) {
        const Feature* weight = packed.const_data_ptr<Feature>() + group * packed.size(1);
        for (int64_t chunk = first; chunk < first + some; ++chunk) forward(block(group, chunk), weight, y);
      });
    });
  }

  // `packed` is packed_back's, of these weights and wanted columns; grad [G, N, out], and y as it was made → gradients of parts that want
  // one; with Keep::kForParameters also of weights and vectors, each as large as what it is of, or added to it.
  void backward(
      const at::Tensor& packed,
      const Rows& grad,
      const Rows& y,
      const std::vector<at::Tensor>& weight_grads,
      const std::vector<at::Tensor>& vector_grads,
      bool adds) const {
    const bool learns = sizes_.keep == Keep::kForParameters;
    const int64_t chunks = sizes_.chunks();
    const at::Tensor lefts = at::empty({learns ? left_offset(sizes_.layers.size()) : 0}, packed.options());
    const at::Tensor sums = at::zeros({chunks, sizes_.groups, sizes_.sums}, at::TensorOptions(at::kFloat));  // of each chunk apart
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = 0; group < sizes_.groups; ++group) {  // outside, so that its weights stay in a near cache
        const Feature* weight = packed.const_data_ptr<Feature>() + group * packed.size(1);
        Feature* left = learns ? lefts.mutable_data_ptr<Feature>() : nullptr;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          float* chunk_sums = sums.mutable_data_ptr<float>() + (chunk * sizes_.groups + group) * sizes_.sums;
          backward(block(group, chunk), weight, grad, y, chunk_sums, left);
        }
      }
    });
    if (!learns) return;
    std::vector<OverRows<Product>> products;
    for (const LearntLayer& layer : sizes_.layers) {
      for (int64_t group = 0; group < sizes_.groups; ++group) {
        float* gradient = weight_grads[layer.number].template mutable_data_ptr<float>() + group * layer.out * layer.in;
        const Feature* left = packed_left(lefts.mutable_data_ptr<Feature>(), layer, group);
        products.push_back({left, sizes_.inputs(kept_, layer, group), layer.out, layer.in, gradient, adds});
      }
    }
    multiply_over_rows(products, sizes_.depth);
    float* all = sums.mutable_data_ptr<float>();
    const int64_t size = sizes_.groups * sizes_.sums;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {  // in this order
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) all[j] += all[chunk * size + j];
    }
    for (const LearntLayer& layer : sizes_.layers) {
      for (int64_t v = 0; v < layer.own_vectors(); ++v) {
        float* to = vector_grads[layer.vectors + v].template mutable_data_ptr<float>();
        for (int64_t group = 0; group < sizes_.groups; ++group) {
          const float* sum = all + group * sizes_.sums + layer.sums + v * layer.out;
          for (int64_t j = 0; j < layer.out; ++j) to[group * layer.out + j] = adds ? to[group * layer.out + j] + sum[j] : sum[j];
        }
      }
    }
  }

  // All weights for the products forwards → [G, size], layer by layer.
  at::Tensor packed_forth() const {
    int64_t size = 0;
    for (const LearntLayer& layer : sizes_.layers) size += Sizes::forth(layer).packed_size();
    const at::Tensor packed = at::empty({sizes_.groups, size}, c10::CppTypeToScalarType<Feature>::value);
    Feature* to = packed.mutable_data_ptr<Feature>();
    for (const LearntLayer& layer : sizes_.layers) {
      const Product product(layer.in, layer.out);
      const int64_t panels = product.panels(), step = given_.weights[layer.number].step;
      const int64_t grain = std::max<int64_t>(1, kGrain / layer.in / Product::kOutputs);
      at::parallel_for(0, sizes_.groups * panels, grain, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t group = unit / panels;
          product.pack(given_.weight(layer, group), step, unit % panels, to + group * size);
        }
      });
      to += product.packed_size();
    }
    return packed;
  }

  // All weights for the products backwards → [G, size], from the last layer to the first, and of that the columns that are wanted.
  at::Tensor packed_back() const {
    constexpr int64_t kSome = 32;  // outputs at a time
    int64_t size = 0;
    for (const LearntLayer& layer : sizes_.layers) size += Sizes::back(layer, columns(layer)).packed_size();
    const at::Tensor packed = at::empty({sizes_.groups, size}, c10::CppTypeToScalarType<Feature>::value);
    Feature* to = packed.mutable_data_ptr<Feature>();
    for (size_t l = sizes_.layers.size(); l-- > 0;) {
      const LearntLayer& layer = sizes_.layers[l];
      const Columns some = columns(layer);
      if (some.count == 0) continue;
      const int64_t pieces = (layer.out + kSome - 1) / kSome, step = given_.weights[l].step;
      const int64_t grain = std::max<int64_t>(1, kGrain / some.count / kSome);
      at::parallel_for(0, sizes_.groups * pieces, grain, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t group = unit / pieces, first = unit % pieces * kSome, count = std::min(kSome, layer.out - first);
          const float* from = given_.weight(layer, group, first) + some.first;
          Product::pack_right(from, step, count, some.count, first, Sizes::padded(layer.out), to + group * size);
        }
      });
      to += Sizes::back(layer, some).packed_size();
    }
    return packed;
  }

 private:
  Sizes sizes_;
  const std::vector<Part>& parts_;
  const Parameters& given_;
  const std::optional<Dropout>& dropout_;
  uint8_t* kept_;
  Columns wanted_;

  static Columns wanted_columns(const std::vector<Part>& parts) {
    int64_t first = -1, end = 0, column = 0;
    for (const Part& part : parts) {
      if (part.gradient && first < 0) first = column;
      column += part.values.dim;
      if (part.gradient) end = column;
    }
    return first < 0 ? Columns{0, 0} : Columns{first, end - first};
  }

  Block block(int64_t group, int64_t chunk) const {
    const int64_t first = chunk * Sizes::chunk_rows();
    return {group, first, std::min(Sizes::chunk_rows(), sizes_.rows - first)};
  }
  const float* factors(const LearntLayer& layer, int64_t group, int64_t row) const {
    return layer.number == 0 && dropout_ ? dropout_->factors(group, row) : nullptr;
  }
  // Of which a layer's gradient is computed.
  Columns columns(const LearntLayer& layer) const { return layer.number ? Columns{0, layer.in} : wanted_; }

  // Rows through all layers.
  void forward(const Block& rows, const Feature* weight, const Rows& y) const {
    static thread_local Scratch<Feature> features_scratch;
    static thread_local Scratch<float> sums_scratch;
    Feature* features = features_scratch.at_least(Sizes::chunk_rows() * sizes_.widest);
    float* sums = sums_scratch.at_least(Sizes::chunk_rows() * sizes_.widest);
    gather(rows, features);
    for (const LearntLayer& layer : sizes_.layers) {
      const int64_t width = Sizes::padded(layer.in), next = Sizes::padded(layer.out);
      clear_behind(features, width, rows.count, layer.in);
      if (sizes_.keep == Keep::kForParameters && (layer.number || rows.group == 0)) {
        Feature* to = sizes_.inputs(kept_, layer, rows.group);
        Product::pack_right(features, width, rows.count, layer.in, rows.first, sizes_.depth, to);
      }
      const Product product = Sizes::forth(layer);
      product.multiply(features, width, round_up(rows.count, Product::kRows), 0, weight, sums);
      end_rows(layer, rows, sums, product.padded_outputs(), features, next, y);
      weight += product.packed_size();
    }
  }

  // The parts' features side by side.
  void gather(const Block& rows, Feature* to) const {
    const int64_t width = Sizes::padded(sizes_.layers[0].in);
    for (int64_t r = 0; r < rows.count; ++r) {
      int64_t column = r * width;
      for (const Part& part : parts_) {
        convert(part.values.template of<float>(0, rows.first + r), part.values.dim, to + column);
        column += part.values.dim;
      }
    }
  }

  // Zeros behind `dim` features of each row, and in the rows that a product takes beyond `count`.
  static void clear_behind(Feature* rows, int64_t width, int64_t count, int64_t dim) {
    for (int64_t r = 0; width > dim && r < count; ++r) std::fill(rows + r * width + dim, rows + (r + 1) * width, Feature(0.0f));
    std::fill(rows + count * width, rows + round_up(count, Product::kRows) * width, Feature(0.0f));
  }

  // A layer's sums, `step` apart, which are overwritten → the next layer's features, `width` apart; or y, after the last.
  void end_rows(
      const LearntLayer& layer, const Block& rows, float* sums, int64_t step, Feature* features, int64_t width, const Rows& y) const {
    const float* shift = given_.vector(layer, 0, rows.group);
    if (!layer.normed) {
      for (int64_t r = 0; r < rows.count; ++r) {
        float *to = y.of<float>(rows.group, rows.first + r), *from = sums + r * step;
#pragma omp simd
        for (int64_t j = 0; j < layer.out; ++j) to[j] = from[j] + shift[j];
      }
      return;
    }
    Norm norm{shift, nullptr, given_.vector(layer, 1, rows.group), given_.vector(layer, 2, rows.group), layer.out};
    for (int64_t first = 0; first < rows.count; first += kTogether) {
      const int64_t end = std::min(first + kTogether, rows.count);
      Moments found[kTogether];
      for (int64_t r = first; r < end; ++r) {
        norm.factors = factors(layer, rows.group, rows.first + r);
        const bool exactly = sizes_.ends_in_simnorm(layer);  // its results are not rounded
        found[r - first] = exactly ? shifted_row<float>(sums + r * step, norm) : shifted_row<Feature>(sums + r * step, norm);
      }
      for (int64_t r = first; r < end; ++r) {
        const int64_t row = rows.first + r;
        Feature* kept = sizes_.keep == Keep::kNothing ? nullptr : sizes_.normed(kept_, layer, rows.group, row);
        if (kept) *sizes_.inverse_std(kept_, layer, rows.group, row) = found[r - first].inverse_std;
        end_row(layer, norm, found[r - first], sums + r * step, kept, features + r * width, y.of<float>(rows.group, row));
      }
    }
  }

  // One row that has a norm.
  void end_row(
      const LearntLayer& layer, const Norm& norm, const Moments& found, float* sums, Feature* kept, Feature* features, float* y) const {
    if (sizes_.ends_in_simnorm(layer)) {
      normalise_row(sums, found, layer.out);
      if (kept) convert(sums, layer.out, kept);
#pragma omp simd
      for (int64_t j = 0; j < layer.out; ++j) sums[j] = sums[j] * norm.weight[j] + norm.bias[j];
      softmax_row(sums, layer.out, sizes_.ends_in, y);
    } else if (sizes_.is_last(layer)) {
      mish_row(sums, found, norm, kept, y);
    } else {
      mish_row(sums, found, norm, kept, features);
    }
  }

  // Rows backwards through all layers; what vectors get is added to `sums`, and what sums get is packed into `left`, if that is given.
  void backward(const Block& rows, const Feature* weight, const Rows& grad, const Rows& y, float* sums, Feature* left) const {
    static thread_local Scratch<Feature> scratch;
    static thread_local Scratch<float> slopes_scratch;
    Feature* features = scratch.at_least(Sizes::chunk_rows() * sizes_.widest);
    float* slopes = slopes_scratch.at_least(Sizes::chunk_rows() * sizes_.widest);  // gradients of what a layer made, then of its sums
    int64_t step = sizes_.layers.back().out;
    for (int64_t r = 0; r < rows.count; ++r) {
      std::copy_n(grad.of<float>(rows.group, rows.first + r), step, slopes + r * step);
      if (sizes_.ends_in > 0) softmax_slope_row(slopes + r * step, y.of<float>(rows.group, rows.first + r), step, sizes_.ends_in);
    }
    for (size_t l = sizes_.layers.size(); l-- > 0;) {
      const LearntLayer& layer = sizes_.layers[l];
      const int64_t width = Sizes::padded(layer.out);
      const RowSums of_vectors{sums + layer.sums, sums + layer.sums + layer.out, sums + layer.sums + 2 * layer.out};
      for (int64_t r = 0; r < rows.count; ++r) {
        back_row(layer, rows.group, rows.first + r, slopes + r * step, of_vectors, features + r * width);
      }
      clear_behind(features, width, rows.count, layer.out);
      if (left) {
        Product::pack_left(features, width, rows.count, layer.out, rows.first, sizes_.depth, packed_left(left, layer, rows.group));
      }
      if (columns(layer).count == 0) return;
      const Product product = Sizes::back(layer, columns(layer));
      step = product.padded_outputs();
      product.multiply(features, width, round_up(rows.count, Product::kRows), 0, weight, slopes);
      weight += product.packed_size();
    }
    scatter(rows, slopes, step);
  }

  // The gradient of what Mish, or SimNorm's softmax, makes of a row, or of a plain one; it is overwritten → that of the row's sums.
  void back_row(const LearntLayer& layer, int64_t group, int64_t row, float* slope, const RowSums& sums, Feature* gradient) const {
    if (!layer.normed) {
#pragma omp simd
      for (int64_t j = 0; j < layer.out; ++j) sums.shift[j] += slope[j];
      return convert(slope, layer.out, gradient);
    }
    const Norm norm{nullptr, factors(layer, group, row), given_.vector(layer, 1, group), given_.vector(layer, 2, group), layer.out};
    const Feature* kept = sizes_.normed(kept_, layer, group, row);
    const float inverse_std = *sizes_.inverse_std(kept_, layer, group, row);
    if (sizes_.ends_in_simnorm(layer)) {
      denormalise_row(slope, kept, inverse_std, norm, sums, gradient, NoSlope());
    } else {
      denormalise_row(slope, kept, inverse_std, norm, sums, gradient, MishSlope());
    }
  }

  // What the wanted columns of the inputs get of the gradient → the parts' gradients, which are sums over groups.
  void scatter(const Block& rows, const float* slopes, int64_t step) const {
    int64_t column = -wanted_.first;
    for (const Part& part : parts_) {
      for (int64_t r = 0; part.gradient && r < rows.count; ++r) {
        const float* from = slopes + r * step + column;
        float* to = part.gradient->template of<float>(0, rows.first + r);
#pragma omp simd
        for (int64_t j = 0; j < part.values.dim; ++j) to[j] = rows.group || part.adds ? to[j] + from[j] : from[j];
      }
      column += part.values.dim;
    }
  }

  // Where the packed gradients of a layer's sums begin.
  int64_t left_offset(size_t layer) const {
    int64_t offset = 0;
    for (size_t l = 0; l < layer; ++l) offset += sizes_.groups * Product::left_size(sizes_.layers[l].out, sizes_.depth);
    return offset;
  }
  Feature* packed_left(Feature* lefts, const LearntLayer& layer, int64_t group) const {
    return lefts + left_offset(layer.number) + group * Product::left_size(layer.out, sizes_.depth);
  }
};

}  // namespace specmpc
