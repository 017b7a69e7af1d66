// The policy prior's draws and the arithmetic of its loss, and their gradients (learning/losses.py has the formulas).

#pragma once

#include "losses.h"

#include <numbers>

namespace specmpc {

// What draws are made of: features [..., 2A] of means and spreads, standard normal eps [..., A], and 1 for each action dimension that the
// row's task has, if not all have all.
struct PolicyDraws {
  int64_t dim, rows;
  Values features, eps;
  std::optional<Values> masks;
  float low, half;  // of log-stds

  PolicyDraws(const at::Tensor& made, const at::Tensor& noise, const std::optional<at::Tensor>& mask, double low, double high)
      : dim(noise.size(-1)),
        rows(noise.numel() / std::max<int64_t>(dim, 1)),
        features(made, 2 * noise.numel(), "features"),
        eps(noise, noise.numel(), "eps"),
        low(low),
        half((high - low) / 2.0) {
    if (mask) masks.emplace(*mask, noise.numel(), "masks");
  }

  // One row.
  struct Row {
    const float *mean, *spread, *eps, *mask;
    int64_t dim;
    float low, half;

    float has(int64_t j) const { return mask ? mask[j] : 1.0f; }
    float squashed(int64_t j) const { return tanh_of(spread[j]); }
    float log_std(int64_t j) const { return (low + half * (squashed(j) + 1.0f)) * has(j); }
    float noise(int64_t j) const { return eps[j] * has(j); }
    float unsquashed(int64_t j) const { return mean[j] * has(j) + noise(j) * capped_exp(log_std(j)); }
    float dimensions() const { return mask ? std::accumulate(mask, mask + dim, 0.0f) : static_cast<float>(dim); }
  };

  Row row(int64_t number) const {
    const float* mean = features.at(2 * number * dim);
    return {mean, mean + dim, eps.at(number * dim), masks ? masks->at(number * dim) : nullptr, dim, low, half};
  }
};

// As losses.draw_policy → actions [..., A], entropies [...] and scaled entropies [...].
inline std::tuple<at::Tensor, at::Tensor, at::Tensor> draw_policy(
    const at::Tensor& features, const at::Tensor& eps, const std::optional<at::Tensor>& masks, double low, double high) {
  const PolicyDraws draws(features, eps, masks, low, high);
  const at::Tensor entropy = at::empty(eps.sizes().slice(0, eps.dim() - 1), eps.options());
  const at::Tensor action = empty_like(eps), scaled = empty_like(entropy);
  float *actions = action.mutable_data_ptr<float>(), *entropies = entropy.mutable_data_ptr<float>();
  float* all_scaled = scaled.mutable_data_ptr<float>();
  const float constant = 0.5 * std::log(2.0 * std::numbers::pi);
  at::parallel_for(0, draws.rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const PolicyDraws::Row row = draws.row(r);
      float gaussian = 0.0f, squashing = 0.0f;
      for (int64_t j = 0; j < draws.dim; ++j) {
        // To the last digit: near 1 the entropy sees it.
        const float a = actions[r * draws.dim + j] = std::tanh(row.unsquashed(j)), noise = row.noise(j);
        gaussian += -0.5f * noise * noise - row.log_std(j) - constant;
        squashing += std::log(std::max(1.0f - a * a, 0.0f) + 1e-6f);
      }
      entropies[r] = squashing - gaussian;
      all_scaled[r] = -gaussian * row.dimensions();
    }
  });
  return {action, entropy, scaled};
}

// What actions and scaled entropies get of a gradient → what the features get.
inline at::Tensor draw_policy_backward(
    const at::Tensor& of_action,
    const at::Tensor& of_scaled,
    const at::Tensor& features,
    const at::Tensor& eps,
    const std::optional<at::Tensor>& masks,
    double low,
    double high) {
  const PolicyDraws draws(features, eps, masks, low, high);
  const Values action_slopes(of_action, eps.numel(), "gradients of actions");
  const Values scaled_slopes(of_scaled, draws.rows, "gradients of entropies");
  const at::Tensor gradient = empty_like(features);
  float* to = gradient.mutable_data_ptr<float>();
  at::parallel_for(0, draws.rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const PolicyDraws::Row row = draws.row(r);
      const float *slope = action_slopes.at(r * draws.dim), of_log_stds = *scaled_slopes.at(r) * row.dimensions();
      float *of_mean = to + 2 * r * draws.dim, *of_spread = of_mean + draws.dim;
      for (int64_t j = 0; j < draws.dim; ++j) {
        const float a = tanh_of(row.unsquashed(j)), before = slope[j] * (1.0f - a * a), t = row.squashed(j);
        of_mean[j] = before * row.has(j);
        of_spread[j] = (before * row.noise(j) * capped_exp(row.log_std(j)) + of_log_stds) * row.has(j) * row.half * (1.0f - t * t);
      }
    }
  });
  return gradient;
}

// Distance of the 5th and 95th percentile, linearly interpolated; of values that are no numbers, as if these were the greatest.
inline float percentile_range(std::vector<float> values) {
  std::sort(values.begin(), values.end(), [](float a, float b) { return a < b || (a == a && b != b); });
  const auto percentile = [&values](double share) {
    const double position = share * (values.size() - 1);
    const size_t below = position, above = std::min(below + 1, values.size() - 1);
    return values[below] + static_cast<float>(position - below) * (values[above] - values[below]);
  };
  return percentile(0.95) - percentile(0.05);
}

// As losses.policy_loss, but for demonstrations: logits [G, N, bins] and scaled entropies [H+1, B] of N draws → the total, the running
// scale, and the gradients of logits and scaled entropies.
inline std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> draw_loss(
    const at::Tensor& logits,
    const at::Tensor& scaled_entropy,
    const at::Tensor& scale,
    double rho,
    double entropy_coef,
    double tau,
    double low,
    double high) {
  TORCH_CHECK(logits.dim() == 3 && scaled_entropy.dim() == 2, "losses: logits are [G, N, bins], entropies [H+1, B]");
  const int64_t heads = logits.size(0), rows = scaled_entropy.numel(), steps = scaled_entropy.size(0), size = rows / steps;
  const Bins bins(logits.size(2), low, high);
  const Values given(logits, heads * rows * bins.count, "logits"), entropies(scaled_entropy, rows, "entropies"), before(scale, 1, "scale");
  std::vector<float> values(rows);
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float sum = 0.0f;
      for (int64_t head = 0; head < heads; ++head) sum += BinsRow(given.at((head * rows + row) * bins.count), bins).expected();
      values[row] = sum / heads;
    }
  });
  const float range = percentile_range({values.begin(), values.begin() + size}), least = range < 1.0f ? 1.0f : range;
  const float now = *before.at(0) + static_cast<float>(tau) * (least - *before.at(0));
  const std::vector<double> weights = step_weights(rho, steps);
  const at::Tensor of_logits = empty_like(logits), of_entropy = empty_like(scaled_entropy);
  float *to = of_logits.mutable_data_ptr<float>(), *to_entropy = of_entropy.mutable_data_ptr<float>();
  at::parallel_for(0, rows, kRowGrain, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const double weight = -weights[row / size] / rows;
      to_entropy[row] = weight * entropy_coef;
      for (int64_t head = 0; head < heads; ++head) {
        const int64_t first = (head * rows + row) * bins.count;
        BinsRow(given.at(first), bins).expected_slope(weight / now / heads, to + first);
      }
    }
  });
  double total = 0.0;
  for (int64_t row = 0; row < rows; ++row) total -= weights[row / size] / rows * (entropy_coef * *entropies.at(row) + values[row] / now);
  const auto scalar = [&scale](double value) { return at::empty({}, scale.options()).fill_(value); };
  return {scalar(total), scalar(now), of_logits, of_entropy};
}

}  // namespace specmpc
