// Distributions over bins that learn: the scalars that they stand for, their loss beside two-hot targets, and the gradients of both
// (twohot.py has the formulas).

#pragma once

#include "row_ends.h"

#include <tuple>

namespace specmpc {

// One row of logits over bins.
class BinsRow {
 public:
  BinsRow(const float* logits, const Bins& bins) : logits_(logits), bins_(bins) {
    float most = -std::numeric_limits<float>::infinity(), sum = 0.0f, weighted = 0.0f;
    const int64_t count = bins.count;
    const float first = -half();
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < count; ++j) most = logits[j] > most ? logits[j] : most;  // std::max is not vectorised
#pragma omp simd reduction(+ : sum, weighted)
    for (int64_t j = 0; j < count; ++j) {
      const float e = capped_exp(logits[j] - most);
      sum += e;
      weighted += e * (static_cast<float>(static_cast<int32_t>(j)) + first);
    }
    most_ = most;
    sum_ = sum;
    bin_ = weighted / sum;
  }

  // The expected scalar.
  float expected() const { return bins_.scalar(bin_); }

  // → its gradient, times `slope`.
  void expected_slope(float slope, float* to) const {
    const float scale = slope * std::exp(std::abs(bins_.symlog(bin_))) * bins_.step / sum_, from = -half() - bin_;
#pragma omp simd
    for (int64_t j = 0; j < bins_.count; ++j) {
      to[j] = capped_exp(logits_[j] - most_) * scale * (static_cast<float>(static_cast<int32_t>(j)) + from);
    }
  }

  // The cross-entropy with a scalar's two-hot coding → its gradient, times `slope`.
  float two_hot_loss(float target, float slope, float* to) const {
    const float scale = slope / sum_;
#pragma omp simd
    for (int64_t j = 0; j < bins_.count; ++j) to[j] = capped_exp(logits_[j] - most_) * scale;
    const auto [below, above, share] = two_hot(target);
    to[below] -= slope * (1.0f - share);
    to[above] -= slope * share;
    return most_ + std::log(sum_) - ((1.0f - share) * logits_[below] + share * logits_[above]);
  }

 private:
  const float* logits_;
  const Bins& bins_;
  float most_, sum_, bin_;  // the greatest logit, the sum of exponentials beside it, and the expected bin, counted from the middle

  float half() const { return static_cast<float>(bins_.count - 1) / 2.0f; }

  // A scalar's two nearest bins, and the share of the one above; not a number if the scalar is none.
  std::tuple<int64_t, int64_t, float> two_hot(float x) const {
    const float last = static_cast<float>(bins_.count - 1);
    const float place = (std::copysign(std::log1p(std::abs(x)), x) - bins_.middle) / bins_.step + half();
    const float within = place < 0.0f ? 0.0f : place > last ? last : place;
    const int64_t below = within >= 0.0f ? static_cast<int64_t>(within) : 0;
    return {below, std::min(below + 1, bins_.count - 1), within - static_cast<float>(below)};
  }
};

}  // namespace specmpc
