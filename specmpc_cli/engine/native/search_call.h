// The planner's functions on a CPU, as operators: rollouts of the policy prior, and one iteration of MPPI (planner.py).

#pragma once

#include "search.h"

#include <ATen/ops/topk.h>

#include <tuple>

namespace specmpc {

// fp32 [B, ...] of B plans.
class PerPlan {
 public:
  PerPlan(const char* name, const at::Tensor& given, at::IntArrayRef shape) : tensor(given.contiguous()), size_(given.numel() / shape[0]) {
    const bool fits = given.scalar_type() == at::kFloat && given.sizes() == shape;
    TORCH_CHECK(fits, "search: ", name, " must be fp32 ", shape, ", got ", given.scalar_type(), " ", given.sizes());
  }
  const float* of(int64_t plan) const { return tensor.const_data_ptr<float>() + plan * size_; }
  float* to(int64_t plan) const { return tensor.data_ptr<float>() + plan * size_; }

  at::Tensor tensor;

 private:
  int64_t size_;
};

inline PerPlan new_per_plan(at::IntArrayRef shape) { return {"a result", at::empty(shape, at::kFloat), shape}; }

inline int64_t plans_of(const at::Tensor& z, const at::Tensor& eps) {
  TORCH_CHECK(z.dim() == 2 && z.size(0) > 0 && eps.dim() == 4 && eps.size(2) > 0, "search: latents [B, Z] and noise [B, N, H, A]");
  return z.size(0);
}

// Calls with the networks, of the dtype they are packed for.
template <typename Call>
void with_nets(at::TensorList packed, at::TensorList vectors, const NetSizes& sizes, Call call) {
  const bool complete = (packed.size() == 4 || packed.size() == 5) && packed.size() == vectors.size();
  TORCH_CHECK(complete, "search: needs dynamics, reward, policy prior and Q-heads, and may have termination");
  switch (packed[0].scalar_type()) {
    case at::kBFloat16:
      return call(Nets<Bf16Product>(packed, vectors, sizes));
    case at::kChar:
      return call(Nets<Int8Product>(packed, vectors, sizes));
    default:
      return call(Nets<Fp32Product>(packed, vectors, sizes));
  }
}

// Networks are given as pack_mlp's weights and their vectors, in the order dynamics, reward, policy prior, Q-heads and, if there is one,
// termination; `sizes` and `ranges` are those of NetSizes.

// P rollouts of the policy prior from z [B, Z] by eps [B, P, H, A] → actions [B, P, H, A], last latents [B, P, Z], returns and weight
// [B, P].
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> prior_rollouts(
    const at::Tensor& z,
    const at::Tensor& eps,
    double discount,
    at::TensorList packed,
    at::TensorList vectors,
    at::IntArrayRef sizes,
    at::ArrayRef<double> ranges) {
  const NetSizes s(sizes, ranges);
  const int64_t plans = plans_of(z, eps), count = eps.size(1), horizon = eps.size(2);
  const PerPlan from("z", z, {plans, s.latent}), noise("prior_eps", eps, {plans, count, horizon, s.action});
  const PerPlan actions = new_per_plan(eps.sizes()), last = new_per_plan({plans, count, s.latent});
  const PerPlan returns = new_per_plan({plans, count}), weight = new_per_plan({plans, count});
  with_nets(packed, vectors, s, [&](const auto& nets) {
    for (int64_t plan = 0; plan < plans; ++plan) {
      const RolloutsOf<float> to{actions.to(plan), last.to(plan), returns.to(plan), weight.to(plan)};
      roll_prior(nets, from.of(plan), noise.of(plan), count, horizon, discount, to);
    }
  });
  return {actions.tensor, last.tensor, returns.tensor, weight.tensor};
}

// How MPPI weighs the best candidates.
struct Weighing {
  int64_t num_elites;
  float temperature, min_std, max_std;
};

// What one iteration makes of a plan's candidates: the weighted mean and spread of the best; these, in descending order; their weights and
// values.
struct Found {
  float *mean, *std, *elites, *scores, *elite_values;  // [H, A] twice, [K, H, A], [K] twice
};

// `values` [N] are those of actions [N, H, A].
inline void refit(const float* actions, const at::Tensor& values, int64_t length, const Weighing& how, const Found& found) {
  // By torch's own function: where values are equal, as those of an ended episode may be, the elites are those of the official code, too.
  const auto [best, order] = at::topk(values, how.num_elites);
  const float* best_values = best.const_data_ptr<float>();
  const int64_t* index = order.const_data_ptr<int64_t>();
  float *mean = found.mean, *spread = found.std, *elites = found.elites, *scores = found.scores;
  std::copy_n(best_values, how.num_elites, found.elite_values);
  float sum = 0.0f, total = 1e-9f;
  for (int64_t k = 0; k < how.num_elites; ++k) {
    std::copy_n(actions + index[k] * length, length, elites + k * length);
    scores[k] = std::exp(how.temperature * (best_values[k] - best_values[0]));
    sum += scores[k];
  }
  std::fill_n(mean, length, 0.0f);
  for (int64_t k = 0; k < how.num_elites; ++k) {
    scores[k] /= sum;
    total += scores[k];
    for (int64_t j = 0; j < length; ++j) mean[j] += scores[k] * elites[k * length + j];
  }
  for (int64_t j = 0; j < length; ++j) {
    mean[j] /= total;
    float squares = 0.0f;
    for (int64_t k = 0; k < how.num_elites; ++k) {
      const float distance = elites[k * length + j] - mean[j];
      squares += scores[k] * distance * distance;
    }
    spread[j] = std::clamp(std::sqrt(squares / total), how.min_std, how.max_std);
  }
}

// One iteration from z [B, Z]: candidates around mean and std [B, H, A] by sample_eps [B, N-P, H, A], and `prior`, which prior_rollouts
// made; their values by the heads q_index [B, 2] at draws with terminal_eps [B, N, A]. → mean and std [B, H, A], elites [B, K, H, A], their
// scores and values [B, K], all values [B, N].
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> iterate(
    const at::Tensor& z,
    const at::Tensor& mean,
    const at::Tensor& std,
    at::TensorList prior,
    const at::Tensor& sample_eps,
    const at::Tensor& terminal_eps,
    const at::Tensor& q_index,
    at::TensorList packed,
    at::TensorList vectors,
    at::IntArrayRef sizes,
    at::ArrayRef<double> ranges,
    int64_t num_elites,
    double discount,
    double temperature,
    double min_std,
    double max_std) {
  const NetSizes s(sizes, ranges);
  const int64_t plans = plans_of(z, sample_eps), drawn = sample_eps.size(1), horizon = sample_eps.size(2), length = horizon * s.action;
  TORCH_CHECK(prior.size() == 4 && prior[2].dim() == 2, "search: rollouts are actions, last latents, returns and weights");
  const int64_t of_prior = prior[2].size(1), total = of_prior + drawn;
  TORCH_CHECK(0 < num_elites && num_elites <= total, "search: ", num_elites, " elites of ", total, " candidates");
  TORCH_CHECK(q_index.sizes() == at::IntArrayRef({plans, 2}), "search: two heads of each plan");
  const auto steps = [=, &s](int64_t count) { return std::vector<int64_t>{plans, count, horizon, s.action}; };
  const PerPlan from("z", z, {plans, s.latent}), noise("sample_eps", sample_eps, steps(drawn));
  const PerPlan around("mean", mean, {plans, horizon, s.action}), widely("std", std, {plans, horizon, s.action});
  const PerPlan last_noise("terminal_eps", terminal_eps, {plans, total, s.action});
  const PerPlan prior_actions("prior actions", prior[0], steps(of_prior));
  const PerPlan prior_last("prior latents", prior[1], {plans, of_prior, s.latent});
  const PerPlan prior_returns("prior returns", prior[2], {plans, of_prior}), prior_weight("prior weights", prior[3], {plans, of_prior});

  const PerPlan new_mean = new_per_plan(mean.sizes()), new_std = new_per_plan(mean.sizes()), elites = new_per_plan(steps(num_elites));
  const PerPlan scores = new_per_plan({plans, num_elites}), elite_values = new_per_plan({plans, num_elites});
  const PerPlan values = new_per_plan({plans, total});
  const Weighing how{num_elites, static_cast<float>(temperature), static_cast<float>(min_std), static_cast<float>(max_std)};
  std::vector<float> actions(total * length);
  with_nets(packed, vectors, s, [&](const auto& nets) {
    const std::vector<int64_t> heads = picked_heads(q_index.flatten(), nets.q.heads());
    for (int64_t p = 0; p < plans; ++p) {
      const RolloutsOf<const float> rolled{prior_actions.of(p), prior_last.of(p), prior_returns.of(p), prior_weight.of(p)};
      const Candidates candidates{
          .from_prior = of_prior,
          .drawn = drawn,
          .horizon = horizon,
          .z = from.of(p),
          .mean = around.of(p),
          .std = widely.of(p),
          .sample_eps = noise.of(p),
          .terminal_eps = last_noise.of(p),
          .prior = rolled,
          .heads = &heads[2 * p],
          .actions = actions.data(),
          .values = values.to(p)};
      value(nets, candidates, discount);
      const Found found{new_mean.to(p), new_std.to(p), elites.to(p), scores.to(p), elite_values.to(p)};
      refit(actions.data(), values.tensor[p], length, how, found);
    }
  });
  return {new_mean.tensor, new_std.tensor, elites.tensor, scores.tensor, elite_values.tensor, values.tensor};
}

}  // namespace specmpc
