// Adam's step after the gradients' norm was bounded (Kingma and Ba, 2015, algorithm 1): all parameters in one call.

#pragma once

#include "rows.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <numeric>
#include <vector>

namespace specmpc {

constexpr int64_t kPieceGrain = 4;  // pieces that are worth a thread

// What an optimiser knows of some neighbouring values.
struct AdamPiece {
  float *value, *gradient, *mean, *square;  // the latter are its moments
  int64_t count;
  double lr, step;
};

struct AdamNumbers {
  double beta1, beta2, eps;
};

// Each parameter in pieces, after all were looked at; `steps`, how many each has taken, grow by one.
inline std::vector<AdamPiece> adam_pieces(
    at::TensorList parameters,
    at::TensorList gradients,
    at::TensorList means,
    at::TensorList squares,
    at::TensorList steps,
    at::ArrayRef<double> lrs) {
  constexpr int64_t kSome = 4096;  // values of a piece
  const size_t count = parameters.size();
  const bool complete = gradients.size() == count && means.size() == count && squares.size() == count && steps.size() == count;
  TORCH_CHECK(complete && lrs.size() == count && count > 0, "adam: as many gradients, moments and steps as parameters");
  for (size_t p = 0; p < count; ++p) {
    for (const at::Tensor& given : {parameters[p], gradients[p], means[p], squares[p]}) {
      const bool fits = given.scalar_type() == at::kFloat && given.is_contiguous() && given.sizes() == parameters[p].sizes();
      TORCH_CHECK(fits, "adam: parameters, gradients and moments are fp32, side by side and of one shape");
    }
    TORCH_CHECK(steps[p].scalar_type() == at::kFloat && steps[p].numel() == 1, "adam: steps are scalars of fp32");
  }
  std::vector<AdamPiece> pieces;
  for (size_t p = 0; p < count; ++p) {
    const double step = *steps[p].mutable_data_ptr<float>() += 1.0f;
    float *value = parameters[p].mutable_data_ptr<float>(), *gradient = gradients[p].mutable_data_ptr<float>();
    float *mean = means[p].mutable_data_ptr<float>(), *square = squares[p].mutable_data_ptr<float>();
    for (int64_t first = 0; first < parameters[p].numel(); first += kSome) {
      const int64_t some = std::min(kSome, parameters[p].numel() - first);
      pieces.push_back({value + first, gradient + first, mean + first, square + first, some, lrs[p], step});
    }
  }
  return pieces;
}

// The gradients' norm; sums are of pieces, so that they do not depend on the number of threads.
inline float norm_of(const std::vector<AdamPiece>& pieces) {
  std::vector<double> sums(pieces.size());
  at::parallel_for(0, pieces.size(), kPieceGrain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const float* gradient = pieces[p].gradient;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < pieces[p].count; ++j) sum += gradient[j] * gradient[j];
      sums[p] = sum;
    }
  });
  return std::sqrt(std::accumulate(sums.begin(), sums.end(), 0.0));
}

// A step with gradients of which `scale` is taken.
inline void step(const AdamPiece& piece, const AdamNumbers& numbers, float scale) {
  const float fresh_mean = 1.0 - numbers.beta1, old_square = numbers.beta2, fresh_square = 1.0 - numbers.beta2, eps = numbers.eps;
  const float rate = piece.lr / (1.0 - std::pow(numbers.beta1, piece.step));
  const float correction = 1.0 / std::sqrt(1.0 - std::pow(numbers.beta2, piece.step));
  float *value = piece.value, *mean = piece.mean, *square = piece.square;
  const float* gradient = piece.gradient;
#pragma omp simd
  for (int64_t j = 0; j < piece.count; ++j) {
    const float g = gradient[j] * scale;
    mean[j] += fresh_mean * (g - mean[j]);
    square[j] = old_square * square[j] + fresh_square * g * g;
    value[j] -= rate * mean[j] / (std::sqrt(square[j]) * correction + eps);
  }
}

// Takes a step with gradients whose common norm is `max_norm` at most: else they are scaled to it. `lrs` has a learning rate for each
// parameter. → the norm before.
inline at::Tensor clipped_adam(
    at::TensorList parameters,
    at::TensorList gradients,
    at::TensorList means,
    at::TensorList squares,
    at::TensorList steps,
    at::ArrayRef<double> lrs,
    double beta1,
    double beta2,
    double eps,
    double max_norm) {
  const std::vector<AdamPiece> pieces = adam_pieces(parameters, gradients, means, squares, steps, lrs);
  const AdamNumbers numbers{beta1, beta2, eps};
  const float norm = norm_of(pieces);
  const double ratio = max_norm / (norm + 1e-6);  // as torch has it
  const float scale = ratio < 1.0 || ratio != ratio ? ratio : 1.0;  // what is no number makes all parameters none
  at::parallel_for(0, pieces.size(), kPieceGrain, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) step(pieces[p], numbers, scale);
  });
  return at::empty({}, parameters[0].options()).fill_(norm);
}

}  // namespace specmpc
