// The operators of a CPU: the planner's, and MLPs, in compiled code with gradients (engine/native/__init__.py builds and loads them).

#include "fused_mlp.h"
#include "learnt_call.h"
#include "search_call.h"

#include <torch/library.h>

TORCH_LIBRARY(specmpc, m) {
  m.def("pack_mlp(Tensor[] weights, bool int8, Tensor(a!)? into) -> Tensor(a!)");
  m.def(
      "fused_mlp(Tensor x, Tensor? shared, Tensor packed, Tensor vectors, int[] dims, int softmax_size, int apart, float[]? range,"
      " Tensor? heads) -> Tensor");
  m.def(
      "mlp(Tensor[] parts, Tensor[] weights, Tensor[] vectors, Tensor? heads, Tensor? mask, int ends_in, bool bf16, int keep)"
      " -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor grad, Tensor y, Tensor kept, Tensor[] parts, Tensor[] weights, Tensor[] vectors, Tensor? heads, Tensor? mask,"
      " int ends_in, bool bf16, int keep, bool[] wanted) -> Tensor[]");
  m.def("mlp_kept_bytes(bool bf16, int[] dims, int rows, int groups, int ends_in, int keep) -> int", specmpc::mlp_kept_bytes);
  m.def(
      "prior_rollouts(Tensor z, Tensor eps, float discount, Tensor[] packed, Tensor[] vectors, int[] sizes, float[] ranges)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "iterate(Tensor z, Tensor mean, Tensor std, Tensor[] prior, Tensor sample_eps, Tensor terminal_eps, Tensor q_index, Tensor[] packed,"
      " Tensor[] vectors, int[] sizes, float[] ranges, int num_elites, float discount, float temperature, float min_std, float max_std)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("multiplies_bf16() -> bool", specmpc::Bf16Product::fast);
  m.def("multiplies_int8() -> bool", specmpc::Int8Product::fast);
}

TORCH_LIBRARY_IMPL(specmpc, CPU, m) {
  m.impl("pack_mlp", specmpc::pack_mlp);
  m.impl("mlp", specmpc::mlp);
  m.impl("mlp_backward", specmpc::mlp_backward);
  m.impl("prior_rollouts", specmpc::prior_rollouts);
  m.impl("iterate", specmpc::iterate);
  m.impl("fused_mlp", specmpc::fused_mlp);
}
