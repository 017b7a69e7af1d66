// What a plan's networks make of its candidates, without a word to Python (planner.py has the formulas).
//
// A thread takes its share of the candidates through all steps and networks, and meets the others only when all values are known. What a
// candidate is worth depends neither on the candidates beside it nor on the number of threads.

#pragma once

#include "fused_mlp.h"

#include <array>

namespace specmpc {

// Sizes of latents, actions, hidden layers, bins and SimNorm's groups; ranges of what bins code and of the policy prior's log-std.
struct NetSizes {
  int64_t latent, action, hidden, bins, softmax;
  double lowest, highest;  // of what bins code
  float log_std_low, log_std_high;

  NetSizes(at::IntArrayRef sizes, at::ArrayRef<double> ranges) {
    TORCH_CHECK(sizes.size() == 5 && ranges.size() == 4, "search: networks have five sizes and two ranges");
    latent = sizes[0], action = sizes[1], hidden = sizes[2], bins = sizes[3], softmax = sizes[4];
    lowest = ranges[0], highest = ranges[1], log_std_low = ranges[2], log_std_high = ranges[3];
    TORCH_CHECK(*std::min_element(sizes.begin(), sizes.end()) > 0 && bins > 1, "search: no sizes of networks");
    TORCH_CHECK(latent % softmax == 0, "search: ", latent, " latents are not groups of ", softmax);
  }
  int64_t row() const { return latent + action; }
  Bins coded() const { return {bins, lowest, highest}; }
};

// A network with two hidden layers, packed; or some of them, as heads.
template <typename Product>
class Net {
 public:
  Net(const at::Tensor& packed, const at::Tensor& vectors, const std::array<int64_t, 4>& dims, int64_t apart, int64_t ends_in,
      const std::optional<Bins>& bins = std::nullopt)
      : layers_(dims, apart, ends_in, bins), heads_(packed.dim() == 2 ? packed.size(0) : 1) {
    const bool whole = packed.is_contiguous() && vectors.is_contiguous() && vectors.scalar_type() == at::kFloat;
    TORCH_CHECK(whole && packed.scalar_type() == c10::CppTypeToScalarType<Weight>::value, "search: weights are not packed, or for others");
    const bool fits = packed.numel() == heads_ * layers_.weights() && vectors.numel() == heads_ * layers_.vectors();
    TORCH_CHECK(fits, "search: weights packed for other sizes");
    weights_ = packed.const_data_ptr<Weight>();
    vectors_ = vectors.const_data_ptr<float>();
  }

  int64_t heads() const { return heads_; }

  // As the layers' own functions.
  std::vector<float> shift(const float* shared, int64_t skipped) const { return layers_.shift(shared, skipped, weights_, vectors_); }
  void compute(const float* x, int64_t step, int64_t count, float* y, int64_t y_step, int64_t head = 0) const {
    layers_.compute({x, step, count, y, y_step}, {weights_ + head * layers_.weights(), vectors_ + head * layers_.vectors()});
  }
  void compute_from(int64_t skipped, const float* shift, const float* x, int64_t step, int64_t count, float* y, int64_t y_step) const {
    layers_.compute({x + skipped, step, count, y, y_step}, {weights_, vectors_, shift, skipped});
  }

 private:
  using Weight = typename Product::Weight;

  Layers<Product> layers_;
  int64_t heads_;
  const Weight* weights_;
  const float* vectors_;
};

// Rows of a latent and an action side by side; memory that each thread keeps.
class LatentRows {
 public:
  LatentRows(const NetSizes& sizes, int64_t count) : count(count), step(sizes.row()), latent(sizes.latent), action(sizes.action) {
    static thread_local Scratch<float> scratch;
    x = scratch.at_least(count * step);
  }
  float* latent_of(int64_t r) const { return x + r * step; }
  float* action_of(int64_t r) const { return x + r * step + latent; }

  float* x;
  int64_t count, step, latent, action;
};

// The networks that a plan asks.
template <typename Product>
struct Nets {
  NetSizes sizes;
  Net<Product> dynamics, reward, policy, q;
  std::optional<Net<Product>> termination;

  // In this order; the last one may be missing.
  Nets(at::TensorList packed, at::TensorList vectors, const NetSizes& s)
      : sizes(s),
        dynamics(packed[0], vectors[0], {s.row(), s.hidden, s.hidden, s.latent}, s.latent, s.softmax),
        reward(packed[1], vectors[1], {s.row(), s.hidden, s.hidden, s.bins}, s.latent, 0, s.coded()),
        policy(packed[2], vectors[2], {s.latent, s.hidden, s.hidden, 2 * s.action}, s.latent, 0),
        q(packed[3], vectors[3], {s.row(), s.hidden, s.hidden, s.bins}, s.latent, 0, s.coded()) {
    const std::array<int64_t, 4> dims{s.latent, s.hidden, s.hidden, 1};
    if (packed.size() > 4) termination.emplace(packed[4], vectors[4], dims, s.latent, 0);
  }

  // The first `count` rows' actions become draws of the policy prior. `eps(r)` has a row's noise.
  template <typename Eps>
  void act(const LatentRows& rows, Eps eps) const {
    static thread_local Scratch<float> scratch;
    const int64_t dim = sizes.action, all = rows.count * dim;
    float *out = scratch.at_least(5 * all), *mean = out + 2 * all, *log_std = mean + all, *noise = log_std + all;
    policy.compute(rows.x, rows.step, rows.count, out, 2 * dim);
    for (int64_t r = 0; r < rows.count; ++r) {
      std::copy_n(out + 2 * r * dim, dim, mean + r * dim);
      std::copy_n(out + (2 * r + 1) * dim, dim, log_std + r * dim);
      std::copy_n(eps(r), dim, noise + r * dim);
    }
    const float low = sizes.log_std_low, half = 0.5f * (sizes.log_std_high - low);
#pragma omp simd
    for (int64_t j = 0; j < all; ++j) {
      mean[j] = tanh_of(mean[j] + noise[j] * capped_exp(low + half * (tanh_of(log_std[j]) + 1.0f)));
    }
    for (int64_t r = 0; r < rows.count; ++r) std::copy_n(mean + r * dim, dim, rows.action_of(r));
  }
};

// What latents that all rows have in common add to the first layers.
struct Shared {
  std::vector<float> dynamics, reward;

  template <typename Product>
  Shared(const Nets<Product>& nets, const float* z)
      : dynamics(nets.dynamics.shift(z, nets.sizes.latent)), reward(nets.reward.shift(z, nets.sizes.latent)) {}
};

// Takes rows through `horizon` steps: their latents become those they end in, where no latents are needed at first if they are `shared`.
// `act(t)` sets the actions of a step. → discounted rewards on the way, and the weight of the value at the end: 0 where the episode ended.
template <typename Product, typename Act>
void roll(
    const Nets<Product>& nets,
    const LatentRows& rows,
    const Shared* shared,
    int64_t horizon,
    double discount,
    float* returns,
    float* weight,
    Act act) {
  static thread_local Scratch<float> scratch;
  float *found = scratch.at_least(2 * rows.count), *lasts = found + rows.count;  // 1 until the episode ends
  std::fill_n(returns, rows.count, 0.0f);
  std::fill_n(lasts, rows.count, 1.0f);
  double so_far = 1.0;
  for (int64_t t = 0; t < horizon; ++t) {
    act(t);
    if (t == 0 && shared) {
      nets.reward.compute_from(rows.latent, shared->reward.data(), rows.x, rows.step, rows.count, found, 1);
      nets.dynamics.compute_from(rows.latent, shared->dynamics.data(), rows.x, rows.step, rows.count, rows.x, rows.step);
    } else {
      nets.reward.compute(rows.x, rows.step, rows.count, found, 1);
      nets.dynamics.compute(rows.x, rows.step, rows.count, rows.x, rows.step);
    }
    for (int64_t r = 0; r < rows.count; ++r) returns[r] += static_cast<float>(so_far) * lasts[r] * found[r];
    so_far *= discount;
    if (!nets.termination) continue;
    nets.termination->compute(rows.x, rows.step, rows.count, found, 1);
    for (int64_t r = 0; r < rows.count; ++r) lasts[r] = found[r] > 0.0f ? 0.0f : lasts[r];  // sigmoid(x) > 0.5
  }
  for (int64_t r = 0; r < rows.count; ++r) weight[r] = static_cast<float>(so_far) * lasts[r];
}

// The share of `total` rows, in whole tiles, that one of so many workers has.
struct Share {
  int64_t first, count;

  Share(int64_t total, int64_t tile, int64_t worker, int64_t workers) {
    const int64_t tiles = (total + tile - 1) / tile;
    first = std::min(tiles * worker / workers * tile, total);
    count = std::min(tiles * (worker + 1) / workers * tile, total) - first;
  }
};

template <typename Work>
void for_workers(Work work) {
  const int64_t workers = at::get_num_threads();
  at::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) work(worker, workers);
  });
}

// Rollouts of one plan's candidates.
template <typename Float>
struct RolloutsOf {
  Float *actions, *last, *returns, *weight;  // [N, H, A], [N, Z], [N], [N]
};

// `count` rollouts of the policy prior from z, by eps [count, H, A].
template <typename Product>
void roll_prior(
    const Nets<Product>& nets,
    const float* z,
    const float* eps,
    int64_t count,
    int64_t horizon,
    double discount,
    const RolloutsOf<float>& to) {
  for_workers([&](int64_t worker, int64_t workers) {
    const Share share(count, Product::kRows, worker, workers);
    if (share.count == 0) return;
    const LatentRows rows(nets.sizes, share.count);
    for (int64_t r = 0; r < rows.count; ++r) std::copy_n(z, rows.latent, rows.latent_of(r));
    const auto step_of = [&](int64_t r, int64_t t) { return ((share.first + r) * horizon + t) * rows.action; };
    roll(nets, rows, nullptr, horizon, discount, to.returns + share.first, to.weight + share.first, [&](int64_t t) {
      nets.act(rows, [&](int64_t r) { return eps + step_of(r, t); });
      for (int64_t r = 0; r < rows.count; ++r) std::copy_n(rows.action_of(r), rows.action, to.actions + step_of(r, t));
    });
    for (int64_t r = 0; r < rows.count; ++r) std::copy_n(rows.latent_of(r), rows.latent, to.last + (share.first + r) * rows.latent);
  });
}

// One plan's candidates: the prior's, which were rolled out before, and those drawn from a normal distribution.
struct Candidates {
  int64_t from_prior, drawn, horizon;
  const float *z, *mean, *std, *sample_eps, *terminal_eps;  // [Z], [H, A] twice, [drawn, H, A], [N, A]
  RolloutsOf<const float> prior;
  const int64_t* heads;  // [2]
  float *actions, *values;  // [N, H, A] and [N], which are found
};

template <typename Product>
void value(const Nets<Product>& nets, const Candidates& c, double discount) {
  const NetSizes& sizes = nets.sizes;
  const int64_t length = c.horizon * sizes.action;
  std::copy_n(c.prior.actions, c.from_prior * length, c.actions);
  const Shared shared(nets, c.z);
  for_workers([&](int64_t worker, int64_t workers) {
    const Share drawn(c.drawn, Product::kRows, worker, workers);
    const Share prior(c.from_prior, Product::kRows, workers - 1 - worker, workers);  // so that nobody has the larger part of both
    const int64_t count = drawn.count + prior.count;
    if (count == 0) return;
    const auto candidate = [&](int64_t r) { return r < drawn.count ? c.from_prior + drawn.first + r : prior.first + r - drawn.count; };
    static thread_local Scratch<float> scratch;
    float *returns = scratch.at_least(4 * count), *weight = returns + count, *first = weight + count, *second = first + count;

    float *actions = c.actions + candidate(0) * length;
    for (int64_t r = 0; r < drawn.count; ++r) {
      const float* eps = c.sample_eps + (drawn.first + r) * length;
#pragma omp simd
      for (int64_t j = 0; j < length; ++j) {
        const float action = c.mean[j] + c.std[j] * eps[j];
        actions[r * length + j] = action < -1.0f ? -1.0f : action > 1.0f ? 1.0f : action;
      }
    }
    LatentRows rows(sizes, count);
    rows.count = drawn.count;
    roll(nets, rows, &shared, c.horizon, discount, returns, weight, [&](int64_t t) {
      for (int64_t r = 0; r < rows.count; ++r) std::copy_n(actions + r * length + t * rows.action, rows.action, rows.action_of(r));
    });
    rows.count = count;
    for (int64_t r = drawn.count; r < count; ++r) {
      std::copy_n(c.prior.last + candidate(r) * rows.latent, rows.latent, rows.latent_of(r));
      returns[r] = c.prior.returns[candidate(r)];
      weight[r] = c.prior.weight[candidate(r)];
    }
    nets.act(rows, [&](int64_t r) { return c.terminal_eps + candidate(r) * rows.action; });
    nets.q.compute(rows.x, rows.step, count, first, 1, c.heads[0]);
    nets.q.compute(rows.x, rows.step, count, second, 1, c.heads[1]);
    for (int64_t r = 0; r < count; ++r) {
      const float found = returns[r] + weight[r] * ((first[r] + second[r]) / 2.0f);
      constexpr float kMost = std::numeric_limits<float>::max();
      c.values[candidate(r)] = found != found ? 0.0f : std::clamp(found, -kMost, kMost);
    }
  });
}

}  // namespace specmpc
