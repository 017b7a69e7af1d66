// The operators that compiled code calls on a CPU (engine/native/__init__.py builds and loads them).

#include "fused_mlp.h"
#include "norm_mish.h"

#include <torch/library.h>

TORCH_LIBRARY(specmpc, m) {
  m.def("norm_mish(Tensor x, Tensor shift, Tensor weight, Tensor bias, Tensor? mask) -> Tensor");
  m.def(
      "norm_mish_backward(Tensor grad, Tensor x, Tensor shift, Tensor weight, Tensor bias, Tensor? mask)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("pack_mlp(Tensor[] weights, bool int8, Tensor(a!)? into) -> Tensor(a!)");
  m.def(
      "fused_mlp(Tensor x, Tensor? shared, Tensor packed, Tensor vectors, int[] dims, int softmax_size, int apart, float[]? range,"
      " Tensor? heads) -> Tensor");
  m.def("multiplies_bf16() -> bool", specmpc::Bf16Product::fast);
  m.def("multiplies_int8() -> bool", specmpc::Int8Product::fast);
}

TORCH_LIBRARY_IMPL(specmpc, CPU, m) {
  m.impl("norm_mish", specmpc::norm_mish);
  m.impl("norm_mish_backward", specmpc::norm_mish_backward);
  m.impl("pack_mlp", specmpc::pack_mlp);
  m.impl("fused_mlp", specmpc::fused_mlp);
}
