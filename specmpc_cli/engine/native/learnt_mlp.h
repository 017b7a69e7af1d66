// An MLP that learns: one call forwards, one backwards.
//
// As in fused_mlp.h a thread takes some rows at a time through all layers, forwards and back, so that what lies between products happens in
// a near cache. On the way it packs what gradients of weights are products of: features, and the gradients of sums.

#pragma once

#include "fused_mlp.h"
#include "learnt_rows.h"
#include "products_over_rows.h"

#include <ATen/ops/zeros.h>

namespace specmpc {

// What a forward pass keeps: what gradients of the inputs need, or of the weights, too.
enum class Keep : int64_t { kNothing, kForInputs, kForWeights };

// What the layers are made of, for each group of rows: the same for all, or a head of E.
struct Parameters {
  std::vector<Rows> weights;  // [out, in] or [E, out, in]
  std::vector<PerGroup> vectors;  // of each layer its bias and, where it has a norm, LayerNorm's weight and bias: [out] or [E, out]
  std::vector<int64_t> heads;  // of each group

  const float* weight(int64_t layer, int64_t group, int64_t row = 0) const { return weights[layer].of<float>(heads[group], row); }
  const float* vector(int64_t index, int64_t group) const { return vectors[index].of(heads[group]); }
};

// Some features of the inputs [N, I], and the gradient that they get, if one is wanted.
struct Part {
  Rows values;
  std::optional<Rows> gradient;
};

// Products are computed in the type that `Product` multiplies, of which features and what is kept are; all else is fp32.
template <typename Product>
class LearntMlp {
 public:
  using Feature = typename Product::Weight;

  // `softmax_size`: SimNorm's in the last layer; 0 if that is plain; -1 if it ends as the others do, with LayerNorm and Mish.
  LearntMlp(at::IntArrayRef dims, int64_t rows, int64_t groups, int64_t softmax_size, Keep keep)
      : rows_(rows), depth_(round_up(rows, Product::kInputs)), groups_(groups), softmax_size_(softmax_size), keep_(keep) {
    for (size_t l = 0; l + 1 < dims.size(); ++l) {
      const bool last = l + 2 == dims.size();
      Layer layer{dims[l], dims[l + 1], last, !last || softmax_size != 0};
      layer.vectors = vectors_;
      layer.sums = sums_;
      vectors_ += layer.normed ? 3 : 1;
      sums_ += layer.out * (layer.normed ? 3 : 1);
      widest_ = std::max({widest_, padded(layer.in), forth(layer).padded_outputs(), padded(layer.out), back(layer).padded_outputs()});
      layers_.push_back(layer);
    }
    // Packed inputs come first, because they are whole cache lines.
    for (Layer& layer : layers_) {
      if (keep == Keep::kForWeights) layer.inputs = take((layer.vectors ? groups : 1) * Product::right_size(layer.in, depth_) * sizeof(Feature));
    }
    for (Layer& layer : layers_) {
      if (keep != Keep::kNothing && layer.normed) layer.kept = take(groups * rows * layer.out * sizeof(Feature));
    }
    gap_ = round_up(kept_, sizeof(float)) - kept_;
    kept_ += gap_;
    for (Layer& layer : layers_) {
      if (keep != Keep::kNothing && layer.normed) layer.inverse_stds = take(groups * rows * sizeof(float));
    }
  }

  int64_t kept_bytes() const { return kept_; }
  int64_t vectors() const { return vectors_; }

  // mask [G, N, D]: dropout's factors in the first layer. → y [G, N, out], and what is kept.
  void forward(
      const std::vector<Part>& parts, const Parameters& given, const std::optional<Rows>& mask, const Rows& y, uint8_t* kept) const {
    const at::Tensor packed = packed_forth(given);
    if (gap_) std::memset(kept + layers_[0].inverse_stds - gap_, 0, gap_);
    for_chunks(groups_, [&](int64_t group, int64_t first, int64_t count) {
      static thread_local Scratch<Feature> features_scratch;
      static thread_local Scratch<float> sums_scratch;
      Feature* features = features_scratch.at_least(chunk_rows() * widest_);
      float* sums = sums_scratch.at_least(chunk_rows() * widest_);
      const Feature* weight = packed.const_data_ptr<Feature>() + group * packed.size(1);
      gather(parts, first, count, padded(layers_[0].in), features);
      for (size_t l = 0; l < layers_.size(); ++l) {
        const Layer& layer = layers_[l];
        const int64_t width = padded(layer.in), next = padded(layer.out);
        clear_behind(features, width, count, layer.in);
        if (keep_ == Keep::kForWeights && (l || group == 0)) {
          Feature* to = inputs(kept, layer, group);
          Product::pack_right(features, width, count, layer.in, first, depth_, to);
        }
        const Product product = forth(layer);
        product.multiply(features, width, round_up(count, Product::kRows), 0, weight, sums);
        for (int64_t r = 0; r < count; ++r) {
          const float* factors = l == 0 && mask ? mask->of<float>(group, first + r) : nullptr;
          float *row = sums + r * product.padded_outputs(), *to = y.of<float>(group, first + r);
          end_row(layer, group, first + r, given, factors, row, features + r * next, to, kept);
        }
        weight += product.packed_size();
      }
    });
  }

  // grad [G, N, out], and y as it was made → gradients of parts that want one; with Keep::kForWeights also of weights and vectors, each as
  // large as what it is of.
  void backward(
      const Rows& grad,
      const Rows& y,
      const std::vector<Part>& parts,
      const Parameters& given,
      const std::optional<Rows>& mask,
      uint8_t* kept,
      const std::vector<at::Tensor>& weight_grads,
      const std::vector<at::Tensor>& vector_grads) const {
    const Columns wanted = wanted_columns(parts);
    const at::Tensor packed = packed_back(given, wanted);
    const bool learns = keep_ == Keep::kForWeights;
    const int64_t chunks = (rows_ + chunk_rows() - 1) / chunk_rows();
    const auto floats = at::TensorOptions(at::kFloat);
    const at::Tensor lefts = at::empty({learns ? left_offset(layers_.size()) : 0}, packed.options());
    // Of each chunk's rows apart, so that they do not depend on the number of threads.
    const at::Tensor sums = at::zeros({chunks, groups_, sums_}, floats);
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t group = 0; group < groups_; ++group) {  // outside, so that its weights stay in a near cache
        const Feature* weight = packed.const_data_ptr<Feature>() + group * packed.size(1);
        Feature* left = learns ? lefts.mutable_data_ptr<Feature>() : nullptr;
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t first = chunk * chunk_rows(), count = std::min(chunk_rows(), rows_ - first);
          float* chunk_sums = sums.mutable_data_ptr<float>() + (chunk * groups_ + group) * sums_;
          back_rows(grad, y, parts, given, mask, kept, wanted, weight, group, first, count, chunk_sums, left);
        }
      }
    });
    if (!learns) return;
    std::vector<OverRows<Product>> products;
    for (size_t l = 0; l < layers_.size(); ++l) {
      const auto [in, out] = std::pair(layers_[l].in, layers_[l].out);
      for (int64_t group = 0; group < groups_; ++group) {
        const Feature* left = lefts.const_data_ptr<Feature>() + left_offset(l) + group * Product::left_size(out, depth_);
        float* gradient = weight_grads[l].mutable_data_ptr<float>() + group * out * in;
        products.push_back({left, inputs(kept, layers_[l], group), out, in, gradient});
      }
    }
    multiply_over_rows(products, depth_);
    const at::Tensor total = sums.sum(0);  // [G, sums]
    for (const Layer& layer : layers_) {
      for (int64_t v = 0; v < (layer.normed ? 3 : 1); ++v) {
        const at::Tensor of_groups = total.narrow(1, layer.sums + v * layer.out, layer.out);
        const at::Tensor& to = vector_grads[layer.vectors + v];
        to.copy_(of_groups.view_as(to.dim() == 2 ? of_groups : to));
      }
    }
  }

 private:
  struct Layer {
    int64_t in, out;
    bool last, normed;
    int64_t vectors = 0, sums = 0;  // where its vectors begin: among all vectors, and among all their elements
    int64_t inputs = 0, kept = 0, inverse_stds = 0;  // where what is kept of it begins, in bytes
  };
  // Of the inputs, from the first to the last whose gradient is wanted.
  struct Columns {
    int64_t first, count;
  };

  int64_t rows_, depth_, groups_, softmax_size_;
  Keep keep_;
  std::vector<Layer> layers_;
  int64_t vectors_ = 0, sums_ = 0, widest_ = 0, kept_ = 0, gap_ = 0;

  int64_t take(int64_t bytes) {
    kept_ += bytes;
    return kept_ - bytes;
  }

  static int64_t padded(int64_t dim) { return round_up(dim, Product::kInputs); }
  static Product forth(const Layer& layer) { return {padded(layer.in), layer.out}; }
  static Product back(const Layer& layer) { return {padded(layer.out), layer.in}; }
  static Product back(const Layer& layer, const Columns& wanted) {
    return {padded(layer.out), wanted.count};
  }

  Feature* inputs(uint8_t* kept, const Layer& layer, int64_t group) const {
    const bool shared = &layer == &layers_[0];  // by all groups
    return reinterpret_cast<Feature*>(kept + layer.inputs) + (shared ? 0 : group) * Product::right_size(layer.in, depth_);
  }
  Feature* normed(uint8_t* kept, const Layer& layer, int64_t group, int64_t row) const {
    return reinterpret_cast<Feature*>(kept + layer.kept) + (group * rows_ + row) * layer.out;
  }
  float* inverse_std(uint8_t* kept, const Layer& layer, int64_t group, int64_t row) const {
    return reinterpret_cast<float*>(kept + layer.inverse_stds) + group * rows_ + row;
  }

  static int64_t chunk_rows() {
    constexpr int64_t kSome = 64;
    return round_up(kSome, Product::kRows * Product::kInputs / std::gcd(Product::kRows, Product::kInputs));
  }

  // Calls with a group, a chunk's first row and how many it has.
  template <typename Call>
  void for_chunks(int64_t groups, Call call) const {
    const int64_t chunks = (rows_ + chunk_rows() - 1) / chunk_rows();
    at::parallel_for(0, groups * chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t first = unit % chunks * chunk_rows();
        call(unit / chunks, first, std::min(chunk_rows(), rows_ - first));
      }
    });
  }

  // The parts' features side by side, `width` from one row to the next.
  static void gather(const std::vector<Part>& parts, int64_t first, int64_t count, int64_t width, Feature* to) {
    for (int64_t r = 0; r < count; ++r) {
      int64_t column = r * width;
      for (const Part& part : parts) {
        convert(part.values.template of<float>(0, first + r), part.values.dim, to + column);
        column += part.values.dim;
      }
    }
  }

  // Zeros behind `dim` features of each row, and in the rows that a product takes beyond `count`.
  static void clear_behind(Feature* rows, int64_t width, int64_t count, int64_t dim) {
    for (int64_t r = 0; width > dim && r < count; ++r) std::fill(rows + r * width + dim, rows + (r + 1) * width, Feature(0.0f));
    std::fill(rows + count * width, rows + round_up(count, Product::kRows) * width, Feature(0.0f));
  }

  // A row of a layer's sums, which are overwritten → the next layer's features, or y.
  void end_row(
      const Layer& layer,
      int64_t group,
      int64_t row,
      const Parameters& given,
      const float* factors,
      float* sums,
      Feature* features,
      float* y,
      uint8_t* kept) const {
    const float* shift = given.vector(layer.vectors, group);
    if (!layer.normed) {
#pragma omp simd
      for (int64_t j = 0; j < layer.out; ++j) y[j] = sums[j] + shift[j];
      return;
    }
    const float *weight = given.vector(layer.vectors + 1, group), *bias = given.vector(layer.vectors + 2, group);
    Feature* to = keep_ == Keep::kNothing ? nullptr : normed(kept, layer, group, row);
    float inverse;
    if (layer.last && softmax_size_ > 0) {
      inverse = normalise_row(sums, shift, factors, layer.out);
      if (to) convert(sums, layer.out, to);
#pragma omp simd
      for (int64_t j = 0; j < layer.out; ++j) sums[j] = sums[j] * weight[j] + bias[j];
      softmax_row(sums, layer.out, softmax_size_, y);
    } else if (layer.last) {
      inverse = norm_mish_row(sums, shift, factors, weight, bias, layer.out, to, y);
    } else {
      inverse = norm_mish_row(sums, shift, factors, weight, bias, layer.out, to, features);
    }
    if (to) *inverse_std(kept, layer, group, row) = inverse;
  }

  // Some rows of a group backwards through all layers. `left`: where to pack the gradients of sums.
  void back_rows(
      const Rows& grad,
      const Rows& y,
      const std::vector<Part>& parts,
      const Parameters& given,
      const std::optional<Rows>& mask,
      uint8_t* kept,
      const Columns& wanted,
      const Feature* weight,
      int64_t group,
      int64_t first,
      int64_t count,
      float* sums,
      Feature* left) const {
    static thread_local Scratch<Feature> scratch;
    static thread_local Scratch<float> slopes_scratch;
    Feature* features = scratch.at_least(chunk_rows() * widest_);
    float* slopes = slopes_scratch.at_least(chunk_rows() * widest_);  // of what a layer made, then of its sums
    int64_t step = layers_.back().out;
    for (int64_t r = 0; r < count; ++r) std::copy_n(grad.of<float>(group, first + r), step, slopes + r * step);
    for (size_t l = layers_.size(); l-- > 0;) {
      const Layer& layer = layers_[l];
      const int64_t width = padded(layer.out);
      const RowSums of_vectors{sums + layer.sums, sums + layer.sums + layer.out, sums + layer.sums + 2 * layer.out};
      for (int64_t r = 0; r < count; ++r) {
        const float* factors = l == 0 && mask ? mask->of<float>(group, first + r) : nullptr;
        float* slope = slopes + r * step;
        if (layer.last && softmax_size_ > 0) softmax_slope_row(slope, y.of<float>(group, first + r), layer.out, softmax_size_);
        back_row(layer, group, first + r, given, factors, slope, of_vectors, features + r * width, kept);
      }
      clear_behind(features, width, count, layer.out);
      if (left) {
        Feature* to = left + left_offset(l) + group * Product::left_size(layer.out, depth_);
        Product::pack_left(features, width, count, layer.out, first, depth_, to);
      }
      if (l == 0 && wanted.count == 0) return;
      const Product product = l ? back(layer) : back(layer, wanted);
      step = product.padded_outputs();
      product.multiply(features, width, round_up(count, Product::kRows), 0, weight, slopes);
      weight += product.packed_size();
    }
    scatter(parts, wanted, first, count, slopes, step, group > 0);
  }

  // From the gradient of a row that a layer made, but for a softmax, which is overwritten → that of its sums.
  void back_row(
      const Layer& layer,
      int64_t group,
      int64_t row,
      const Parameters& given,
      const float* factors,
      float* slope,
      const RowSums& sums,
      Feature* gradient,
      uint8_t* kept) const {
    if (!layer.normed) {
#pragma omp simd
      for (int64_t j = 0; j < layer.out; ++j) sums.shift[j] += slope[j];
      return convert(slope, layer.out, gradient);
    }
    const float *weight = given.vector(layer.vectors + 1, group), *bias = given.vector(layer.vectors + 2, group);
    const Feature* x = normed(kept, layer, group, row);
    const float inverse = *inverse_std(kept, layer, group, row);
    if (layer.last && softmax_size_ > 0) {
      denormalise_row(slope, x, inverse, weight, bias, factors, layer.out, sums, gradient, NoSlope());
    } else {
      denormalise_row(slope, x, inverse, weight, bias, factors, layer.out, sums, gradient, MishSlope());
    }
  }

  static void scatter(
      const std::vector<Part>& parts, const Columns& wanted, int64_t first, int64_t count, const float* slopes, int64_t step, bool add) {
    int64_t column = -wanted.first;
    for (const Part& part : parts) {
      for (int64_t r = 0; part.gradient && r < count; ++r) {
        const float* from = slopes + r * step + column;
        float* to = part.gradient->template of<float>(0, first + r);
#pragma omp simd
        for (int64_t j = 0; j < part.values.dim; ++j) to[j] = add ? to[j] + from[j] : from[j];
      }
      column += part.values.dim;
    }
  }

  static Columns wanted_columns(const std::vector<Part>& parts) {
    int64_t first = -1, end = 0, column = 0;
    for (const Part& part : parts) {
      if (part.gradient && first < 0) first = column;
      column += part.values.dim;
      if (part.gradient) end = column;
    }
    return first < 0 ? Columns{0, 0} : Columns{first, end - first};
  }

  // Where the packed gradients of a layer's sums begin.
  int64_t left_offset(size_t layer) const {
    int64_t offset = 0;
    for (size_t l = 0; l < layer; ++l) offset += groups_ * Product::left_size(layers_[l].out, depth_);
    return offset;
  }

  // All weights for forth() → [G, size], layer by layer.
  at::Tensor packed_forth(const Parameters& given) const {
    int64_t size = 0;
    for (const Layer& layer : layers_) size += forth(layer).packed_size();
    const at::Tensor packed = at::empty({groups_, size}, c10::CppTypeToScalarType<Feature>::value);
    Feature* to = packed.mutable_data_ptr<Feature>();
    for (size_t l = 0; l < layers_.size(); ++l) {
      const Layer& layer = layers_[l];
      const Product real(layer.in, layer.out);
      const int64_t panels = real.panels();
      at::parallel_for(0, groups_ * panels, std::max<int64_t>(1, kGrain / layer.in / Product::kOutputs), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t group = unit / panels;
          real.pack(given.weight(l, group), given.weights[l].step, unit % panels, to + group * size);
        }
      });
      to += real.packed_size();
    }
    return packed;
  }

  // All weights for back() → [G, size], from the last layer to the first, and of that the columns that are wanted.
  at::Tensor packed_back(const Parameters& given, const Columns& wanted) const {
    constexpr int64_t kSome = 32;  // outputs at a time
    int64_t size = 0;
    for (const Layer& layer : layers_) size += (&layer == &layers_[0] ? back(layer, wanted) : back(layer)).packed_size();
    const at::Tensor packed = at::empty({groups_, size}, c10::CppTypeToScalarType<Feature>::value);
    Feature* to = packed.mutable_data_ptr<Feature>();
    for (size_t l = layers_.size(); l-- > 0;) {
      const Layer& layer = layers_[l];
      const Columns columns = l ? Columns{0, layer.in} : wanted;
      if (columns.count == 0) continue;
      const int64_t pieces = (layer.out + kSome - 1) / kSome;
      at::parallel_for(0, groups_ * pieces, std::max<int64_t>(1, kGrain / columns.count / kSome), [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
          const int64_t group = unit / pieces, first = unit % pieces * kSome, count = std::min(kSome, layer.out - first);
          const float* from = given.weight(l, group, first) + columns.first;
          Product::pack_right(from, given.weights[l].step, count, columns.count, first, padded(layer.out), to + group * size);
        }
      });
      to += back(layer, columns).packed_size();
    }
    return packed;
  }
};

}  // namespace specmpc
