// The operators of a CPU: the planner's, and what learns, with gradients (engine/native/__init__.py builds and loads them).

#include "adam.h"
#include "draws.h"
#include "fused_mlp.h"
#include "learnt_rollout.h"
#include "policy_loss.h"
#include "search_call.h"

#include <torch/library.h>

TORCH_LIBRARY(specmpc, m) {
  m.def("pack_mlp(Tensor[] weights, bool int8, Tensor(a!)? into) -> Tensor(a!)");
  m.def(
      "fused_mlp(Tensor x, Tensor? shared, Tensor packed, Tensor vectors, int[] dims, int ends_in, int apart, float[]? range,"
      " Tensor? heads) -> Tensor");
  m.def(
      "mlp(Tensor[] parts, Tensor[] weights, Tensor[] vectors, Tensor? heads, Tensor? dropped, float dropout, int ends_in, bool bf16,"
      " int keep) -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor grad, Tensor y, Tensor kept, Tensor[] parts, Tensor[] weights, Tensor[] vectors, Tensor? heads,"
      " Tensor? dropped, float dropout, int ends_in, bool bf16, int keep, bool[] wanted) -> Tensor[]");
  m.def(
      "mlp_rollout(Tensor z, Tensor? beside, Tensor actions, Tensor[] weights, Tensor[] vectors, int ends_in, bool bf16)"
      " -> (Tensor, Tensor)");
  m.def(
      "mlp_rollout_backward(Tensor(a!) of_latents, Tensor latents, Tensor kept, Tensor? beside, Tensor actions, Tensor[] weights,"
      " Tensor[] vectors, int ends_in, bool bf16) -> Tensor[]");
  m.def("decode(Tensor logits, float low, float high) -> Tensor");
  m.def(
      "rollout_loss(Tensor z, Tensor seen, Tensor reward_logits, Tensor q_logits, Tensor? ended_logits, Tensor reward, Tensor target,"
      " Tensor terminated, float rho, float[] coefs, float low, float high) -> (Tensor, Tensor, Tensor, Tensor, Tensor?)");
  m.def("draw_policy(Tensor features, Tensor eps, Tensor? masks, float low, float high) -> (Tensor, Tensor, Tensor)");
  m.def(
      "draw_policy_backward(Tensor of_action, Tensor of_scaled, Tensor features, Tensor eps, Tensor? masks, float low, float high)"
      " -> Tensor");
  m.def(
      "draw_loss(Tensor logits, Tensor scaled_entropy, Tensor scale, float rho, float entropy_coef, float tau, float low, float high)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "prior_rollouts(Tensor z, Tensor eps, float discount, Tensor[] packed, Tensor[] vectors, int[] sizes, float[] ranges)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "iterate(Tensor z, Tensor mean, Tensor std, Tensor[] prior, Tensor sample_eps, Tensor terminal_eps, Tensor q_index, Tensor[] packed,"
      " Tensor[] vectors, int[] sizes, float[] ranges, int num_elites, float discount, float temperature, float min_std, float max_std)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "clipped_adam(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, Tensor(d!)[] steps,"
      " float[] lrs, float beta1, float beta2, float eps, float max_norm) -> Tensor");
  m.def("draw_normals(int stream, int step, int count) -> (Tensor, Tensor)", specmpc::draw_normals);
  m.def("multiplies_bf16() -> bool", specmpc::Bf16Product::fast);
  m.def("multiplies_int8() -> bool", specmpc::Int8Product::fast);
}

TORCH_LIBRARY_IMPL(specmpc, CPU, m) {
  m.impl("pack_mlp", specmpc::pack_mlp);
  m.impl("mlp", specmpc::mlp);
  m.impl("mlp_backward", specmpc::mlp_backward);
  m.impl("mlp_rollout", specmpc::mlp_rollout);
  m.impl("mlp_rollout_backward", specmpc::mlp_rollout_backward);
  m.impl("decode", specmpc::decode);
  m.impl("rollout_loss", specmpc::rollout_loss);
  m.impl("draw_policy", specmpc::draw_policy);
  m.impl("draw_policy_backward", specmpc::draw_policy_backward);
  m.impl("draw_loss", specmpc::draw_loss);
  m.impl("clipped_adam", specmpc::clipped_adam);
  m.impl("prior_rollouts", specmpc::prior_rollouts);
  m.impl("iterate", specmpc::iterate);
  m.impl("fused_mlp", specmpc::fused_mlp);
}
