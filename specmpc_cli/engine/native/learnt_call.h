// The operators for an MLP that learns: what they are given is looked at, before learnt_mlp.h computes.

#pragma once

#include "learnt_mlp.h"

#include <tuple>

namespace specmpc {

// What both passes are given: parts [N, I] of the inputs, weights [out, in] or [E, out, in], and the vectors of each layer. `heads` [G]:
// which of the E each group takes; all in turn, if left out.
struct LearntCall {
  std::vector<int64_t> dims;
  LearntInputs inputs;
  bool grouped;

  LearntCall(
      at::TensorList parts,
      at::TensorList weights,
      at::TensorList vectors,
      const std::optional<at::Tensor>& heads,
      const std::optional<at::Tensor>& dropped,
      double dropout,
      int64_t ends_in) {
    TORCH_CHECK(!parts.empty() && !weights.empty(), "mlp: no inputs, or no weights");
    dims.push_back(0);
    for (const at::Tensor& part : parts) {
      const bool fits = part.dim() == 2 && part.scalar_type() == at::kFloat && part.size(0) == parts[0].size(0);
      TORCH_CHECK(fits && part.numel() > 0, "mlp: inputs are fp32 [N, I]");
      dims[0] += part.size(1);
      inputs.parts.push_back({Rows(part), std::nullopt});
    }
    Parameters& given = inputs.given;
    grouped = weights[0].dim() == 3;
    const int64_t known = grouped ? weights[0].size(0) : 1;
    for (const at::Tensor& weight : weights) {
      const bool fits = (weight.dim() == 2 || weight.dim() == 3) && weight.scalar_type() == at::kFloat && weight.numel() > 0;
      TORCH_CHECK(fits, "mlp: weights are fp32 [out, in] or [E, out, in]");
      TORCH_CHECK(weight.size(-1) == dims.back(), "mlp: ", dims.back(), " features, weights for ", weight.size(-1));
      TORCH_CHECK(weight.dim() == weights[0].dim() && (!grouped || weight.size(0) == known), "mlp: weights of different heads");
      given.weights.emplace_back(weight);
      dims.push_back(weight.size(-2));
    }
    TORCH_CHECK(can_end_in(ends_in, dims.back()), "mlp: ", dims.back(), " features are not groups of ", ends_in);
    size_t vector = 0;
    for (size_t layer = 0; layer < weights.size(); ++layer) {
      const int64_t count = layer + 1 == weights.size() && ends_in == kPlain ? 1 : 3;
      for (int64_t v = 0; v < count; ++v) {
        TORCH_CHECK(vector < vectors.size() && vectors[vector].dim() == weights[0].dim() - 1, "mlp: vectors are [out] or [E, out]");
        given.vectors.emplace_back(vectors[vector++], known, dims[layer + 1]);
      }
    }
    TORCH_CHECK(vector == vectors.size(), "mlp: ", vectors.size(), " vectors, expected ", vector);
    given.heads.resize(known);
    std::iota(given.heads.begin(), given.heads.end(), 0);
    TORCH_CHECK(!heads || grouped, "mlp: heads of weights that have none");
    if (heads) given.heads = picked_heads(*heads, known);
    if (dropped) {
      TORCH_CHECK(dropped->scalar_type() == at::kLong && dropped->dim() == 1, "mlp: what is dropped is int64 [n]");
      const at::Tensor zeros = dropped->contiguous();
      const int64_t *begin = zeros.const_data_ptr<int64_t>(), *end = begin + zeros.numel();
      const int64_t all = groups() * rows() * dims[1];
      const bool fits = std::is_sorted(begin, end) && (begin == end || (*begin >= 0 && end[-1] <= all));
      TORCH_CHECK(fits, "mlp: what is dropped comes in rising order, from 0 to at most ", all);
      TORCH_CHECK(weights.size() > 1 || ends_in != kPlain, "mlp: dropout is for a layer with a norm");
      TORCH_CHECK(dropout >= 0.0 && dropout < 1.0, "mlp: not all features can be dropped");
      inputs.dropout.emplace(Dropout{zeros, rows(), dims[1], static_cast<float>(1.0 / (1.0 - dropout))});
    }
  }

  int64_t rows() const { return inputs.parts[0].values.count; }
  int64_t groups() const { return inputs.given.heads.size(); }
  std::vector<int64_t> results() const {
    return grouped ? std::vector<int64_t>{groups(), rows(), dims.back()} : std::vector<int64_t>{rows(), dims.back()};
  }
};

// Calls with the sizes for products of the wanted type.
template <typename Call>
void with_sizes(bool bf16, at::IntArrayRef dims, int64_t rows, int64_t groups, int64_t ends_in, int64_t keep, Call call) {
  TORCH_CHECK(keep >= 0 && keep <= 2, "mlp: keep is 0, 1 or 2");
  const auto what = static_cast<Keep>(keep);
  if (bf16) {
    call(LearntSizes<Bf16Product>(dims, rows, groups, ends_in, what));
  } else {
    call(LearntSizes<Fp32Product>(dims, rows, groups, ends_in, what));
  }
}

// Inputs, side by side in `parts`, through layers with LayerNorm and Mish; `ends_in`: how the last one ends (learnt_sizes.h). `dropped`:
// features of the first layer that are zero before its norm, in rising order, counted through [G, N, D], with a chance of `dropout`.
// `bf16`: products and features are. `keep`: nothing (0), what gradients of inputs need (1), or those of weights and vectors, too (2).
// → y [N, out] or [G, N, out], fp32, and what is kept.
inline std::tuple<at::Tensor, at::Tensor> mlp(
    at::TensorList parts,
    at::TensorList weights,
    at::TensorList vectors,
    const std::optional<at::Tensor>& heads,
    const std::optional<at::Tensor>& dropped,
    double dropout,
    int64_t ends_in,
    bool bf16,
    int64_t keep) {
  const LearntCall call(parts, weights, vectors, heads, dropped, dropout, ends_in);
  TORCH_CHECK(keep != 2 || !heads, "mlp: picked heads do not learn");
  at::Tensor y = at::empty(call.results(), parts[0].options()), kept;
  with_sizes(bf16, call.dims, call.rows(), call.groups(), ends_in, keep, [&](const auto& sizes) {
    kept = at::empty({sizes.kept_bytes}, parts[0].options().dtype(at::kByte));
    const LearntMlp mlp(sizes, call.inputs, kept.mutable_data_ptr<uint8_t>());
    mlp.forward(mlp.packed_forth(), Rows(y));
  });
  return {y, kept};
}

// → the gradients of those parts that are `wanted`, then, with keep 2, of all weights and vectors.
inline std::vector<at::Tensor> mlp_backward(
    const at::Tensor& grad,
    const at::Tensor& y,
    const at::Tensor& kept,
    at::TensorList parts,
    at::TensorList weights,
    at::TensorList vectors,
    const std::optional<at::Tensor>& heads,
    const std::optional<at::Tensor>& dropped,
    double dropout,
    int64_t ends_in,
    bool bf16,
    int64_t keep,
    const c10::List<bool>& wanted) {
  LearntCall call(parts, weights, vectors, heads, dropped, dropout, ends_in);
  TORCH_CHECK(keep == 1 || (keep == 2 && !heads), "mlp_backward: nothing was kept for these gradients");
  const bool floats = grad.scalar_type() == at::kFloat && y.scalar_type() == at::kFloat && kept.scalar_type() == at::kByte;
  const bool same = grad.sizes() == y.sizes() && y.sizes() == at::IntArrayRef(call.results()) && wanted.size() == parts.size();
  TORCH_CHECK(floats && same && kept.is_contiguous(), "mlp_backward: gradients of another call");
  std::vector<at::Tensor> gradients;
  const auto another = [&gradients](const at::Tensor& of) { return gradients.emplace_back(empty_like(of)); };
  for (size_t part = 0; part < parts.size(); ++part) {
    if (wanted[part]) call.inputs.parts[part].gradient.emplace(another(parts[part]));
  }
  std::vector<at::Tensor> of_weights, of_vectors;
  for (size_t l = 0; keep == 2 && l < weights.size(); ++l) of_weights.push_back(another(weights[l]));
  for (size_t v = 0; keep == 2 && v < vectors.size(); ++v) of_vectors.push_back(another(vectors[v]));
  with_sizes(bf16, call.dims, call.rows(), call.groups(), ends_in, keep, [&](const auto& sizes) {
    TORCH_CHECK(kept.numel() == sizes.kept_bytes, "mlp_backward: gradients of another call");
    const LearntMlp mlp(sizes, call.inputs, kept.mutable_data_ptr<uint8_t>());
    mlp.backward(mlp.packed_back(), Rows(grad), Rows(y), of_weights, of_vectors, false);
  });
  return gradients;
}

}  // namespace specmpc
