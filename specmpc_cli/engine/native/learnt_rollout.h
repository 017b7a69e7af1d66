// An MLP that learns by rolling out: what it makes in one step is the first part of the next one's inputs. Its weights are packed once.

#pragma once

#include "learnt_call.h"

namespace specmpc {

// What the steps are given: latents [H+1, N, Z], the parts beside them, which are the same in all steps [N, D], if there are some, and
// actions [H, N, A].
struct Rollout {
  at::Tensor latents, actions;
  std::optional<at::Tensor> beside;
  at::TensorList weights, vectors;
  int64_t ends_in;

  int64_t steps() const { return actions.size(0); }

  LearntCall step(int64_t number) const {
    std::vector<at::Tensor> parts{latents[number]};
    if (beside) parts.push_back(*beside);
    parts.push_back(actions[number]);
    LearntCall call(parts, weights, vectors, std::nullopt, std::nullopt, 0.0, ends_in);
    TORCH_CHECK(at::IntArrayRef(call.results()) == latents[number].sizes(), "mlp_rollout: results are not as the latents were");
    return call;
  }
};

constexpr int64_t kKeepAll = static_cast<int64_t>(Keep::kForParameters);

// From z [N, Z] → latents [H+1, N, Z], z first, and what each step kept.
inline std::tuple<at::Tensor, at::Tensor> mlp_rollout(
    const at::Tensor& z,
    const std::optional<at::Tensor>& beside,
    const at::Tensor& actions,
    at::TensorList weights,
    at::TensorList vectors,
    int64_t ends_in,
    bool bf16) {
  TORCH_CHECK(z.dim() == 2 && actions.dim() == 3 && actions.size(0) > 0, "mlp_rollout: z is [N, Z], actions are [H, N, A]");
  const Rollout rollout{at::empty({actions.size(0) + 1, z.size(0), z.size(1)}, z.options()), actions, beside, weights, vectors, ends_in};
  rollout.latents[0].copy_(z);
  at::Tensor kept, packed;
  for (int64_t t = 0; t < rollout.steps(); ++t) {
    const LearntCall call = rollout.step(t);
    with_sizes(bf16, call.dims, call.rows(), 1, ends_in, kKeepAll, [&](const auto& sizes) {
      if (t == 0) kept = at::empty({rollout.steps(), round_up(sizes.kept_bytes, kLine)}, z.options().dtype(at::kByte));
      const LearntMlp mlp(sizes, call.inputs, kept.mutable_data_ptr<uint8_t>() + t * kept.size(1));
      if (t == 0) packed = mlp.packed_forth();
      mlp.forward(packed, Rows(rollout.latents[t + 1]));
    });
  }
  return {rollout.latents, kept};
}

// `of_latents` is the latents' gradient from elsewhere; what they get through later latents is added to it. → gradients of all weights and
// vectors, then that of `beside`, if there is one.
inline std::vector<at::Tensor> mlp_rollout_backward(
    const at::Tensor& of_latents,
    const at::Tensor& latents,
    const at::Tensor& kept,
    const std::optional<at::Tensor>& beside,
    const at::Tensor& actions,
    at::TensorList weights,
    at::TensorList vectors,
    int64_t ends_in,
    bool bf16) {
  const Rollout rollout{latents, actions, beside, weights, vectors, ends_in};
  const bool same = of_latents.sizes() == latents.sizes() && of_latents.scalar_type() == at::kFloat && of_latents.is_contiguous();
  TORCH_CHECK(same && latents.size(0) == rollout.steps() + 1, "mlp_rollout_backward: gradients of another call");
  std::vector<at::Tensor> of_weights, of_vectors, gradients;
  for (const at::Tensor& weight : weights) gradients.push_back(of_weights.emplace_back(empty_like(weight)));
  for (const at::Tensor& vector : vectors) gradients.push_back(of_vectors.emplace_back(empty_like(vector)));
  if (beside) gradients.push_back(empty_like(*beside));
  at::Tensor packed;
  for (int64_t t = rollout.steps(); t-- > 0;) {
    const bool later = t + 1 < rollout.steps();
    LearntCall call = rollout.step(t);
    call.inputs.parts[0].gradient.emplace(of_latents[t]);
    call.inputs.parts[0].adds = true;
    if (beside) call.inputs.parts[1].gradient.emplace(gradients.back());
    if (beside) call.inputs.parts[1].adds = later;
    with_sizes(bf16, call.dims, call.rows(), 1, ends_in, kKeepAll, [&](const auto& sizes) {
      TORCH_CHECK(kept.dim() == 2 && kept.size(1) >= sizes.kept_bytes, "mlp_rollout_backward: gradients of another call");
      const LearntMlp mlp(sizes, call.inputs, kept.mutable_data_ptr<uint8_t>() + t * kept.size(1));
      if (!later) packed = mlp.packed_back();
      mlp.backward(packed, Rows(of_latents[t + 1]), Rows(latents[t + 1]), of_weights, of_vectors, later);
    });
  }
  return gradients;
}

}  // namespace specmpc
