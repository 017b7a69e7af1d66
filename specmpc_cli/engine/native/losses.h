// The arithmetic of TD-MPC2's losses on what the networks made, and its gradients (learning/losses.py has the formulas).
//
// Sums are taken row after row, so they do not depend on the number of threads.

#pragma once

#include "bins.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <vector>

namespace specmpc {

// Values in memory, of which there must be as many as expected.
class Values {
 public:
  Values(const at::Tensor& given, int64_t count, const char* name) : values_(given.contiguous()) {
    TORCH_CHECK(given.scalar_type() == at::kFloat && given.numel() == count, "losses: ", name, " should be ", count, " values of fp32");
  }
  const float* at(int64_t first) const { return values_.const_data_ptr<float>() + first; }

 private:
  at::Tensor values_;
};

// Each step of a rollout weighs `rho` times the one before it.
inline std::vector<double> step_weights(double rho, int64_t steps) {
  std::vector<double> weights{1.0};
  while (static_cast<int64_t>(weights.size()) < steps) weights.push_back(weights.back() * rho);
  return weights;
}

constexpr int64_t kRowGrain = 16;  // rows that are worth a thread

// Scalars [...] that logits [..., bins] stand for.
inline at::Tensor decode(const at::Tensor& logits, double low, double high) {
  const Bins bins(logits.size(-1), low, high);
  const Values rows(logits, logits.numel(), "logits");
  const at::Tensor values = at::empty(logits.sizes().slice(0, logits.dim() - 1), logits.options());
  float* to = values.mutable_data_ptr<float>();
  at::parallel_for(0, values.numel(), kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) to[row] = BinsRow(rows.at(row * bins.count), bins).expected();
  });
  return values;
}

// The coefficients of the losses.
struct Coefs {
  double consistency, reward, value, termination;
};

// What each row of a rollout is compared with, and how much it weighs.
struct RolloutLosses {
  const Bins& bins;
  Coefs coefs;
  int64_t dim, heads, rows;

  // A latent and what was seen there → its share of the loss, and its gradient.
  double consistency(const float* made, const float* seen, double weight, float* slope) const {
    const float scale = coefs.consistency * weight / dim * 2.0;
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < dim; ++j) {
      const float distance = made[j] - seen[j];
      squares += distance * distance;
      slope[j] = scale * distance;
    }
    return squares * weight / dim;
  }

  double reward(const float* logits, float truth, double weight, float* slope) const {
    return BinsRow(logits, bins).two_hot_loss(truth, coefs.reward * weight, slope) * weight;
  }

  // `logits` and `slope` are of the first head; those of the others follow, of as many rows each.
  double value(const float* logits, float truth, double weight, float* slope) const {
    double loss = 0.0;
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t first = head * rows * bins.count;
      loss += BinsRow(logits + first, bins).two_hot_loss(truth, coefs.value * weight / heads, slope + first);
    }
    return loss * weight / heads;
  }

  // Binary cross-entropy, in which all steps weigh the same.
  double termination(float logit, float truth, float* slope) const {
    const float e = std::exp(-std::abs(logit));
    *slope = coefs.termination / rows * ((logit < 0.0f ? e : 1.0f) / (1.0f + e) - truth);
    return (std::max(logit, 0.0f) - logit * truth + std::log1p(e)) / rows;
  }
};

// As losses.world_model_loss: z [H+1, B, Z], seen [H, B, Z], and of all N = H·B logits of rewards [N, bins], of E heads [E, N, bins] and, if
// there are some, of terminations [N], with the reward, the TD target and whether the episode terminated. `coefs`: of consistency, reward,
// value and termination. → the total and these four losses [5], and the gradients of z and the logits.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::optional<at::Tensor>> rollout_loss(
    const at::Tensor& z,
    const at::Tensor& seen,
    const at::Tensor& reward_logits,
    const at::Tensor& q_logits,
    const std::optional<at::Tensor>& ended_logits,
    const at::Tensor& reward,
    const at::Tensor& target,
    const at::Tensor& terminated,
    double rho,
    at::ArrayRef<double> coefs,
    double low,
    double high) {
  TORCH_CHECK(z.dim() == 3 && z.size(0) > 1 && coefs.size() == 4, "losses: z is [H+1, B, Z], and has four coefficients");
  const int64_t steps = z.size(0) - 1, size = z.size(1), dim = z.size(2), heads = q_logits.size(0), rows = steps * size;
  const Bins bins(q_logits.size(-1), low, high);
  const RolloutLosses of{bins, {coefs[0], coefs[1], coefs[2], coefs[3]}, dim, heads, rows};
  const Values latents(z, (steps + 1) * size * dim, "z"), wanted(seen, rows * dim, "seen");
  const Values of_rewards(reward_logits, rows * bins.count, "reward logits"), of_values(q_logits, heads * rows * bins.count, "q logits");
  const Values rewards(reward, rows, "rewards"), targets(target, rows, "targets"), ends(terminated, rows, "terminations");
  const at::Tensor z_grad = at::zeros(z.sizes(), z.options()), reward_grad = empty_like(reward_logits), q_grad = empty_like(q_logits);
  std::optional<Values> of_ends;
  std::optional<at::Tensor> ended_grad;
  if (ended_logits) {
    of_ends.emplace(*ended_logits, rows, "termination logits");
    ended_grad = empty_like(*ended_logits);
  }
  float *to_z = z_grad.mutable_data_ptr<float>(), *to_reward = reward_grad.mutable_data_ptr<float>();
  float *to_q = q_grad.mutable_data_ptr<float>(), *to_end = ended_grad ? ended_grad->mutable_data_ptr<float>() : nullptr;
  const std::vector<double> weights = step_weights(rho, steps);
  std::vector<std::array<double, 4>> losses(rows);  // each row's share of the four means
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double weight = weights[row / size] / rows;
      const int64_t next = (row + size) * dim, logits = row * bins.count;
      losses[row] = {
          of.consistency(latents.at(next), wanted.at(row * dim), weight, to_z + next),
          of.reward(of_rewards.at(logits), *rewards.at(row), weight, to_reward + logits),
          of.value(of_values.at(logits), *targets.at(row), weight, to_q + logits),
          of_ends ? of.termination(*of_ends->at(row), *ends.at(row), to_end + row) : 0.0};
    }
  });
  const at::Tensor all = at::zeros({5}, z.options());
  float* loss = all.mutable_data_ptr<float>();
  for (int64_t part = 0; part < 4; ++part) {
    double sum = 0.0;
    for (const auto& share : losses) sum += share[part];
    loss[part + 1] = sum;
    loss[0] += coefs[part] * sum;
  }
  return {all, z_grad, reward_grad, q_grad, ended_grad};
}

}  // namespace specmpc
