// The planner's normal draws on a CPU: numpy's own, word for word (Generator(Philox(key)).standard_normal in fp32), at a fraction of the
// time.

#pragma once

#include "rows.h"

#include <ATen/ops/empty.h>

#include <array>
#include <tuple>

namespace specmpc {

// Philox4x64-10 (Salmon et al., 2011) in the order in which numpy gives its words out: counters from 1 on, of each word the low half first.
class Philox {
 public:
  Philox(uint64_t first, uint64_t second) : keys_{first, second} {}

  uint32_t next() {
    if (at_ == kHalves) refill();
    return halves_[at_++];
  }
  // The next so many, if that many are left of those that were made; they are taken by `skip`.
  const uint32_t* ahead(uint64_t count) const { return at_ + count <= kHalves ? halves_ + at_ : nullptr; }
  void skip(uint64_t count) { at_ += count; }
  float uniform() { return static_cast<float>(next() >> 8) * 0x1p-24f; }

  // What numpy's generator of this key must hold to go on: counter, block, words of it taken, whether half a word is left, and which.
  std::array<uint64_t, 8> state() const {
    const uint64_t taken = kHalves * (refills_ - 1) + at_, words = (taken + 1) / 2, counter = (words + 3) / 4, left = taken % 2;
    const Block x = block(counter);
    const uint64_t of_block = words - 4 * (counter - 1);
    return {counter, x[0], x[1], x[2], x[3], of_block, left, left ? x[of_block - 1] >> 32 : 0};
  }

 private:
  using Block = std::array<uint64_t, 4>;
  static constexpr uint64_t kBlocks = 64, kHalves = 8 * kBlocks;  // that are made at a time, because blocks need not wait for each other
  uint64_t keys_[2], refills_ = 0, at_ = kHalves;
  uint32_t halves_[kHalves];

  void refill() {
    for (uint64_t b = 0; b < kBlocks; ++b) {
      const Block x = block(refills_ * kBlocks + b + 1);
      for (uint64_t w = 0; w < 4; ++w) {
        halves_[8 * b + 2 * w] = static_cast<uint32_t>(x[w]);
        halves_[8 * b + 2 * w + 1] = static_cast<uint32_t>(x[w] >> 32);
      }
    }
    ++refills_;
    at_ = 0;
  }

  Block block(uint64_t counter) const {
    Block x{counter, 0, 0, 0};
    uint64_t first = keys_[0], second = keys_[1];
    for (int round = 0; round < 10; ++round) {
      const unsigned __int128 left = static_cast<unsigned __int128>(0xd2e7470ee14c6c93u) * x[0];
      const unsigned __int128 right = static_cast<unsigned __int128>(0xca5a826395121157u) * x[2];
      const auto high = [](unsigned __int128 product) { return static_cast<uint64_t>(product >> 64); };
      x = {high(right) ^ x[1] ^ first, static_cast<uint64_t>(right), high(left) ^ x[3] ^ second, static_cast<uint64_t>(left)};
      first += 0x9e3779b97f4a7c15u;
      second += 0xbb67ae8584caa73bu;
    }
    return x;
  }
};

// A ziggurat of 256 layers (Marsaglia and Tsang, 2000), whose rounding is numpy's.
class Ziggurat {
 public:
  static const Ziggurat& of_normals() {
    static const Ziggurat ziggurat;
    return ziggurat;
  }

  void draw(Philox& words, int64_t count, float* to) const {
    constexpr int64_t kSome = 16;
    for (int64_t i = 0; i < count;) {
      const uint32_t* some = i + kSome <= count ? words.ahead(kSome) : nullptr;
      if (some && all_inside(some, kSome, to + i)) {
        words.skip(kSome);
        i += kSome;
      } else {
        for (const int64_t end = std::min(i + kSome, count); i < end; ++i) to[i] = draw(words);
      }
    }
  }

 private:
  static constexpr int kLayers = 256;
  static constexpr double kEdge = 3.6541528853610088;  // where the tail begins
  uint32_t inside_[kLayers];
  float widths_[kLayers], heights_[kLayers];

  // What words stand for, layer by layer; whether none of them needs another word.
  bool all_inside(const uint32_t* words, int64_t count, float* to) const {
    int32_t outside = 0;
#pragma omp simd reduction(| : outside)
    for (int64_t j = 0; j < count; ++j) {
      to[j] = value(words[j]);
      outside |= words[j] >> 9 >= inside_[words[j] & 0xff];
    }
    return !outside;
  }

  SPECMPC_INLINED float value(uint32_t word) const {
    const float x = static_cast<float>(static_cast<int32_t>(word >> 9)) * widths_[word & 0xff];
    return std::bit_cast<float>(std::bit_cast<uint32_t>(x) | (word >> 8 & 1) << 31);
  }

  float draw(Philox& words) const {
    for (;;) {
      const uint32_t word = words.next(), layer = word & 0xff, place = word >> 9;
      const float x = value(word);
      if (place < inside_[layer]) return x;  // 99 in 100
      if (layer == 0) return tail(words, place >> 8 & 1);
      // Neither sum may be fused with its product: that would round once.
      volatile float above = (heights_[layer - 1] - heights_[layer]) * words.uniform();
      if (above + heights_[layer] < std::exp(-0.5 * x * x)) return x;
    }
  }

  Ziggurat() {
    const double scale = 0x1p23, density = std::exp(-0.5 * kEdge * kEdge);
    const double area = kEdge * density + std::sqrt(std::acos(-1.0) / 2.0) * std::erfc(kEdge / std::sqrt(2.0));
    std::array<double, kLayers + 1> edges{};
    edges[kLayers] = area / density;
    edges[kLayers - 1] = kEdge;
    for (int i = kLayers - 2; i > 0; --i) {
      edges[i] = std::sqrt(-2.0 * std::log(area / edges[i + 1] + std::exp(-0.5 * edges[i + 1] * edges[i + 1])));
    }
    for (int i = 0; i < kLayers; ++i) {
      const double width = i ? edges[i] : edges[kLayers], within = i ? edges[i - 1] : kEdge;
      widths_[i] = width / scale;
      inside_[i] = std::rint(within / width * scale);
      heights_[i] = std::exp(-0.5 * edges[i] * edges[i]);
    }
  }

  static float tail(Philox& words, bool negative) {
    constexpr float kInverse = 1.0 / kEdge, kFirst = kEdge;
    for (;;) {
      volatile float beyond = -kInverse * std::log1p(-words.uniform());
      const float bound = -std::log1p(-words.uniform());
      if (bound + bound > beyond * beyond) return negative ? -(kFirst + beyond) : kFirst + beyond;
    }
  }
};

// So many normal draws of a key, and the state from which numpy goes on (`Philox::state`).
inline std::tuple<at::Tensor, at::Tensor> draw_normals(int64_t stream, int64_t step, int64_t count) {
  TORCH_CHECK(count > 0, "draws: at least one");
  Philox words(stream, step);
  const at::Tensor draws = at::empty({count}, at::TensorOptions(at::kFloat)), after = at::empty({8}, at::TensorOptions(at::kLong));
  float* to = draws.mutable_data_ptr<float>();
  Ziggurat::of_normals().draw(words, count, to);
  const auto state = words.state();
  std::copy_n(state.data(), state.size(), reinterpret_cast<uint64_t*>(after.mutable_data_ptr<int64_t>()));
  return {draws, after};
}

}  // namespace specmpc
