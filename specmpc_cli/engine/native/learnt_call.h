// The operators for an MLP that learns: what they are given is looked at, before learnt_mlp.h computes.

#pragma once

#include "learnt_mlp.h"

#include <tuple>

namespace specmpc {

// What both passes are given, looked at: parts [N, I], weights [out, in] or [E, out, in], and the vectors of each layer. `heads` [G]: which
// of the E each group takes; all in turn, if left out.
class MlpCall {
 public:
  MlpCall(
      at::TensorList parts,
      at::TensorList weights,
      at::TensorList vectors,
      const std::optional<at::Tensor>& heads,
      int64_t softmax_size) {
    TORCH_CHECK(!parts.empty() && !weights.empty(), "mlp: no inputs, or no weights");
    dims.push_back(0);
    for (const at::Tensor& part : parts) {
      TORCH_CHECK(part.dim() == 2 && part.scalar_type() == at::kFloat && part.size(0) == parts[0].size(0), "mlp: inputs are fp32 [N, I]");
      dims[0] += part.size(1);
      inputs.push_back({Rows(part), std::nullopt});
    }
    const int64_t known = weights[0].dim() == 3 ? weights[0].size(0) : 1;
    for (const at::Tensor& weight : weights) {
      const bool grouped = weight.dim() == 3;
      TORCH_CHECK((grouped || weight.dim() == 2) && weight.scalar_type() == at::kFloat, "mlp: weights are fp32 [out, in] or [E, out, in]");
      TORCH_CHECK(weight.size(-1) == dims.back(), "mlp: ", dims.back(), " features, weights for ", weight.size(-1));
      TORCH_CHECK((grouped ? weight.size(0) : 1) == known && grouped == (weights[0].dim() == 3), "mlp: weights of different heads");
      given.weights.emplace_back(weight);
      dims.push_back(weight.size(-2));
    }
    const bool in_groups = softmax_size <= 0 || dims.back() % softmax_size == 0;
    TORCH_CHECK(in_groups, "mlp: ", dims.back(), " features are not groups of ", softmax_size);
    size_t vector = 0;
    for (size_t layer = 0; layer < weights.size(); ++layer) {
      const int64_t count = layer + 1 == weights.size() && softmax_size == 0 ? 1 : 3;
      for (int64_t v = 0; v < count; ++v) {
        TORCH_CHECK(vector < vectors.size() && vectors[vector].dim() == weights[0].dim() - 1, "mlp: vectors are [out] or [E, out]");
        given.vectors.emplace_back(vectors[vector++], known, dims[layer + 1]);
      }
    }
    TORCH_CHECK(vector == vectors.size(), "mlp: ", vectors.size(), " vectors, expected ", vector);
    given.heads.resize(known);
    std::iota(given.heads.begin(), given.heads.end(), 0);
    if (heads) given.heads = picked_heads(*heads, known);
    grouped = weights[0].dim() == 3;
  }

  int64_t rows() const { return inputs[0].values.count; }
  int64_t groups() const { return given.heads.size(); }
  std::vector<int64_t> results() const {
    return grouped ? std::vector<int64_t>{groups(), rows(), dims.back()} : std::vector<int64_t>{rows(), dims.back()};
  }
  std::optional<Rows> factors(const std::optional<at::Tensor>& mask) const {
    if (!mask) return std::nullopt;
    const Rows found(*mask);
    const bool alike = found.groups == groups() && found.count == rows() && found.dim == dims[1];
    TORCH_CHECK(alike && mask->scalar_type() == at::kFloat, "mlp: a mask is fp32, for each feature of the first layer");
    return found;
  }

  std::vector<int64_t> dims;
  std::vector<Part> inputs;
  Parameters given;
  bool grouped;
};

// Calls with a LearntMlp of the wanted type.
template <typename Call>
void with_mlp(bool bf16, at::IntArrayRef dims, int64_t rows, int64_t groups, int64_t softmax_size, int64_t keep, Call call) {
  TORCH_CHECK(keep >= 0 && keep <= 2, "mlp: keep is 0, 1 or 2");
  const auto what = static_cast<Keep>(keep);
  if (bf16) {
    call(LearntMlp<Bf16Product>(dims, rows, groups, softmax_size, what));
  } else {
    call(LearntMlp<Fp32Product>(dims, rows, groups, softmax_size, what));
  }
}

// How many bytes `mlp` keeps for its gradient.
inline int64_t mlp_kept_bytes(bool bf16, at::IntArrayRef dims, int64_t rows, int64_t groups, int64_t softmax_size, int64_t keep) {
  int64_t bytes = 0;
  with_mlp(bf16, dims, rows, groups, softmax_size, keep, [&](const auto& mlp) { bytes = mlp.kept_bytes(); });
  return bytes;
}

// Inputs, side by side in `parts`, through layers with LayerNorm and Mish; `softmax_size` says how the last one ends (LearntMlp). `mask`:
// dropout's factors before the first norm. `bf16`: products and features are. `keep`: nothing (0), what gradients of inputs need (1), or
// those of weights, too (2). → y [N, out] or [G, N, out], fp32, and what is kept.
inline std::tuple<at::Tensor, at::Tensor> mlp(
    at::TensorList parts,
    at::TensorList weights,
    at::TensorList vectors,
    const std::optional<at::Tensor>& heads,
    const std::optional<at::Tensor>& mask,
    int64_t softmax_size,
    bool bf16,
    int64_t keep) {
  const MlpCall call(parts, weights, vectors, heads, softmax_size);
  at::Tensor y = at::empty(call.results(), parts[0].options()), kept;
  with_mlp(bf16, call.dims, call.rows(), call.groups(), softmax_size, keep, [&](const auto& mlp) {
    kept = at::empty({mlp.kept_bytes()}, parts[0].options().dtype(at::kByte));
    mlp.forward(call.inputs, call.given, call.factors(mask), Rows(y), kept.mutable_data_ptr<uint8_t>());
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
    const std::optional<at::Tensor>& mask,
    int64_t softmax_size,
    bool bf16,
    int64_t keep,
    const c10::List<bool>& wanted) {
  MlpCall call(parts, weights, vectors, heads, softmax_size);
  TORCH_CHECK(wanted.size() == parts.size() && (keep != 2 || !heads), "mlp_backward: picked heads do not learn");
  std::vector<at::Tensor> gradients;
  const auto like = [&gradients](const at::Tensor& given) { return gradients.emplace_back(at::empty(given.sizes(), given.options())); };
  for (size_t part = 0; part < parts.size(); ++part) {
    if (wanted[part]) call.inputs[part].gradient.emplace(like(parts[part]));
  }
  std::vector<at::Tensor> of_weights, of_vectors;
  for (size_t l = 0; keep == 2 && l < weights.size(); ++l) of_weights.push_back(like(weights[l]));
  for (size_t v = 0; keep == 2 && v < vectors.size(); ++v) of_vectors.push_back(like(vectors[v]));
  with_mlp(bf16, call.dims, call.rows(), call.groups(), softmax_size, keep, [&](const auto& mlp) {
    TORCH_CHECK(kept.numel() == mlp.kept_bytes() && grad.sizes() == y.sizes(), "mlp_backward: of another call");
    uint8_t* bytes = kept.mutable_data_ptr<uint8_t>();
    mlp.backward(Rows(grad), Rows(y), call.inputs, call.given, call.factors(mask), bytes, of_weights, of_vectors);
  });
  return gradients;
}

}  // namespace specmpc
