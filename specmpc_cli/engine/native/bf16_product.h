// Products in bf16 with sums in fp32 (products.h).

#pragma once

#include "products.h"

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specmpc {

// Two inputs of an output lie side by side, as every processor that multiplies bf16 wants them: in AMX's tiles of
// 16 rows × 32 inputs, of which 2 × 2 are held at a time, or in vector registers, where an instruction takes a pair of inputs.
class Bf16Product {
 public:
  using Weight = at::BFloat16;
  using Features = PlainFeatures<at::BFloat16>;

#ifdef __AMX_BF16__
  static constexpr int64_t kRows = 32, kInputs = 32;
#else
  static constexpr int64_t kRows = 8, kInputs = 2;
#endif
  static constexpr int64_t kOutputs = 32;
  static constexpr bool kRough = true;

  // What a thread must hold while it multiplies over rows. With AMX: its tiles are eight of 16 rows × 64 bytes, while it lives.
  class Session {
#ifdef __AMX_BF16__
   public:
    explicit Session(bool needed = has_tiles()) : needed_(needed) {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      in_memory(&config);
      if (needed_) _tile_loadconfig(&config);
    }
    ~Session() {
      if (needed_) _tile_release();
    }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;

   private:
    bool needed_;
#endif
  };

  Bf16Product(int64_t in, int64_t out, Care = {}) : in_(in), out_(out), padded_in_(round_up(in, kInputs)) {}

  int64_t padded_outputs() const { return round_up(out_, kOutputs); }
  int64_t panels() const { return padded_outputs() / kOutputs; }
  int64_t packed_size() const { return right_size(out_, padded_in_); }

  // weight: rows of in_ inputs, fp32 or bf16. A panel has, for each pair of inputs, the pairs of all its outputs.
  template <typename Input>
  void pack(const Input* weight, int64_t step, int64_t panel, at::BFloat16* packed) const {
    const int64_t real = std::min(kOutputs, out_ - panel * kOutputs);
    Pair* to = reinterpret_cast<Pair*>(packed + panel * kOutputs * padded_in_);
    for (int64_t from = 0; from < padded_in_; from += 2 * kBlock) {
      const int64_t inputs = std::clamp<int64_t>(in_ - from, 0, 2 * kBlock), pairs = std::min((padded_in_ - from) / 2, kBlock);
      for (int64_t first = 0; first < kOutputs; first += kBlock) {
        alignas(64) Pair block[kBlock][kBlock];
        for (int64_t j = 0; j < kBlock; ++j) {
          const int64_t output = first + j;
          pairs_of(weight + (panel * kOutputs + output) * step + from, output < real ? inputs : 0, block[j]);
        }
        transpose(block);
        for (int64_t k = 0; k < pairs; ++k) std::memcpy(to + (from / 2 + k) * kOutputs + first, block[k], sizeof(block[k]));
      }
    }
  }

  // `count` rows, `step` apart, fp32 or bf16, of all inputs but the first `skipped` → sums [count, padded_outputs()], behind which there is
  // room up to a multiple of kRows. With the instructions of this machine where it has them.
  template <typename Input>
  void multiply(const Input* x, int64_t step, int64_t count, int64_t skipped, const at::BFloat16* packed, float* sums) const {
    const int64_t first = skipped / kInputs * kInputs, depth = padded_in_ - first;
    const Operand rows = operand(x, step, count, in_ - skipped, skipped - first, depth);
    const at::BFloat16* weights = packed + first * kOutputs;
    [[maybe_unused]] const Session session;
    const Way way = in_best_way();
    for (int64_t panel = 0; panel < panels(); ++panel) {
      for (int64_t r = 0; r < count; r += kRows) {
        float* to = sums + r * padded_outputs() + panel * kOutputs;
        const Operand some{rows.x + r * rows.step, rows.step};
        way(some, weights + panel * kOutputs * padded_in_, depth, out_ - panel * kOutputs, to, padded_outputs(), false);
      }
    }
  }

  // Inputs that another layer makes, row by row.
  template <typename Make>
  void take(Features& features, int64_t r, Make make) const {
    make(features.rows + r * in_);
  }
  void multiply(const Features& features, int64_t count, const at::BFloat16* packed, float* sums) const {
    multiply(features.rows, in_, count, 0, packed, sums);
  }

  // As in Fp32Product, but each two rows of a feature lie side by side; `first` and `depth` are multiples of kInputs, up to which zeros
  // follow the rows.
  static int64_t left_size(int64_t dim, int64_t depth) { return round_up(dim, kRows) * depth; }
  static int64_t right_size(int64_t dim, int64_t depth) { return round_up(dim, kOutputs) * depth; }
  static int64_t right_width(int64_t, int64_t) { return kOutputs; }

  template <typename Input>
  static void pack_left(const Input* rows, int64_t step, int64_t count, int64_t dim, int64_t first, int64_t depth, at::BFloat16* packed) {
    pair_up(rows, step, count, dim, [=](int64_t r, int64_t from, const Pair* pairs) {
      constexpr int64_t kAtOnce = kInputs / 2;  // pairs of a feature that lie side by side
      for (int64_t j = 0; j < kOutputs && from + j < round_up(dim, kRows); j += kRows) {
        Pair* to = reinterpret_cast<Pair*>(packed + (from + j) * depth + (first + r) / kInputs * kInputs * kRows) + r % kInputs / 2;
        if constexpr (kAtOnce == 1) {
          std::memcpy(to, pairs + j, kRows * sizeof(Pair));
        } else {
          for (int64_t o = 0; o < kRows; ++o) to[o * kAtOnce] = pairs[j + o];
        }
      }
    });
  }
  template <typename Input>
  static void pack_right(const Input* rows, int64_t step, int64_t count, int64_t dim, int64_t first, int64_t depth, at::BFloat16* packed) {
    pair_up(rows, step, count, dim, [=](int64_t r, int64_t from, const Pair* pairs) {
      std::copy_n(pairs, kOutputs, reinterpret_cast<Pair*>(packed + from * depth + (first + r) * kOutputs));
    });
  }

  // `from` and `end` are multiples of kInputs; needs a Session.
  static void over_rows(
      const at::BFloat16* left, const at::BFloat16* right, int64_t, int64_t from, int64_t end, float* sums, int64_t step, bool add) {
    const Operand rows{left + from * kRows, kInputs, kInputs * kRows};
    in_best_way()(rows, right + from * kOutputs, end - from, kOutputs, sums, step, add);
  }

  // Whether this machine has instructions for such products.
  static bool fast() {
#ifdef __AVX512BF16__
    return true;
#else
    return has_tiles();
#endif
  }

 private:
  static constexpr int64_t kPanelStep = 2 * kOutputs;  // from one pair of inputs to the next

  using Pair = FourBytes;  // values side by side

  // Rows, and in each of them kInputs side by side: so many values from one to the next.
  struct Operand {
    const at::BFloat16* x;
    int64_t step, inputs_step = kInputs;
  };

  // kRows rows of `depth` inputs with one panel of weights → kOutputs sums of each row, `step` apart, of which `needed` are somebody's;
  // `add`: to what is there.
  using Way = void (*)(const Operand& rows, const at::BFloat16* panel, int64_t depth, int64_t needed, float* sums, int64_t step, bool add);

  // Up to kOutputs values in bf16, side by side, with zeros behind them.
  template <typename Input>
  static void pairs_of(const Input* values, int64_t count, void* to) {
    alignas(64) at::BFloat16 all[kOutputs];
    if (count == kOutputs) {
      convert(values, kOutputs, all);
    } else {
      std::fill_n(all, kOutputs, at::BFloat16(0.0f));
      convert(values, count, all);
    }
    std::memcpy(to, all, sizeof(all));
  }

  // Calls with each second row's number, a panel's first feature, and each feature's values in that row and the next.
  template <typename Input, typename Call>
  static void pair_up(const Input* rows, int64_t step, int64_t count, int64_t dim, Call call) {
    alignas(64) uint16_t upper[kOutputs], lower[kOutputs];
    alignas(64) Pair pairs[kOutputs];
    for (int64_t r = 0; r < round_up(count, kInputs); r += 2) {
      for (int64_t from = 0; from < dim; from += kOutputs) {
        const int64_t some = std::min(kOutputs, dim - from);
        const Input* values = rows + r * step + from;
        pairs_of(values, r < count ? some : 0, upper);
        pairs_of(values + step, r + 1 < count ? some : 0, lower);
#pragma omp simd
        for (int64_t j = 0; j < kOutputs; ++j) pairs[j] = upper[j] | static_cast<Pair>(lower[j]) << 16;
        call(r, from, pairs);
      }
    }
  }

  int64_t in_, out_, padded_in_;

  // Rows of `depth` inputs, a multiple of kRows of them: those `given`, as they are or copied, with `lacking` zeros before and some behind.
  template <typename Input>
  static Operand operand(const Input* x, int64_t step, int64_t count, int64_t given, int64_t lacking, int64_t depth) {
    if constexpr (std::is_same_v<Input, at::BFloat16>) {
      if (given == depth && count % kRows == 0) return {x, step};
    }
    static thread_local Scratch<at::BFloat16> scratch;
    at::BFloat16* rows = scratch.at_least(round_up(count, kRows) * depth);
    for (int64_t r = 0; r < count; ++r) {
      at::BFloat16* to = rows + r * depth;
      std::fill_n(to, lacking, at::BFloat16(0.0f));
      convert(x + r * step, given, to + lacking);
      std::fill(to + lacking + given, to + depth, at::BFloat16(0.0f));
    }
    return {rows, depth};
  }

  static Way in_best_way() {
#ifdef __AMX_BF16__
    if (has_tiles()) return in_tiles;
#endif
#ifdef __AVX512BF16__
    return in_vectors;
#else
    return in_plain_loops;
#endif
  }

  static void in_plain_loops(
      const Operand& rows, const at::BFloat16* panel, int64_t depth, int64_t /* needed */, float* sums, int64_t step, bool add) {
    for (int64_t r = 0; r < kRows; ++r) {
      float total[kOutputs] = {};
      if (add) std::copy_n(sums + r * step, kOutputs, total);
      for (int64_t k = 0; k < depth; ++k) {
        const float value = to_float(rows.x[r * rows.step + k / kInputs * rows.inputs_step + k % kInputs]);
        const at::BFloat16* weights = panel + k / 2 * kPanelStep + k % 2;
        for (int64_t j = 0; j < kOutputs; ++j) total[j] += value * to_float(weights[2 * j]);
      }
      std::copy(total, total + kOutputs, sums + r * step);
    }
  }

#ifdef __AVX512BF16__
  // As in_plain_loops; an instruction adds a pair's products for 16 outputs.
  static void in_vectors(
      const Operand& rows, const at::BFloat16* panel, int64_t depth, int64_t needed, float* sums, int64_t step, bool add) {
    if (rows.inputs_step != kInputs) return sums_in_vectors<kInputs * kRows, 2>(rows, panel, depth, sums, step, add);
    if (needed > kLanes) return sums_in_vectors<kInputs, 2>(rows, panel, depth, sums, step, add);
    sums_in_vectors<kInputs, 1>(rows, panel, depth, sums, step, add);
  }

  static constexpr int64_t kLanes = 16;

  // V·kLanes sums of each row.
  template <int64_t kInputsStep, int64_t V>
  static void sums_in_vectors(const Operand& rows, const at::BFloat16* panel, int64_t depth, float* sums, int64_t step, bool add) {
    constexpr int64_t kHeld = 8;  // rows whose sums fill half of the registers, or a quarter
    for (int64_t first = 0; first < kRows; first += kHeld) {
      const int64_t row_step = kInputsStep == kInputs ? rows.step : kInputs;
      const at::BFloat16* x = rows.x + first * row_step;
      __m512 sum[kHeld][V] = {};
      for (int64_t r = 0; add && r < kHeld; ++r) {
        for (int64_t v = 0; v < V; ++v) sum[r][v] = _mm512_loadu_ps(sums + (first + r) * step + v * kLanes);
      }
#pragma GCC unroll 4
      for (int64_t k = 0; k < depth; k += 2) {
        __m512bh weights[V];
        for (int64_t v = 0; v < V; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(panel + k / 2 * kPanelStep + v * 2 * kLanes);
        for (int64_t r = 0; r < kHeld; ++r) {
          int32_t pair;
          std::memcpy(&pair, x + r * row_step + k / kInputs * kInputsStep + k % kInputs, sizeof(pair));
          const __m512bh everywhere = (__m512bh)_mm512_set1_epi32(pair);
          for (int64_t v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], weights[v], everywhere);
        }
      }
      for (int64_t r = 0; r < kHeld; ++r) {
        for (int64_t v = 0; v < V; ++v) _mm512_storeu_ps(sums + (first + r) * step + v * kLanes, sum[r][v]);
      }
    }
  }
#endif

  // Whether there are tiles: the system grants them, and they compute what they should.
  static bool has_tiles() {
    static const bool found = [] {
#ifdef __AMX_BF16__
      constexpr long kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl's ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
      return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 && tiles_are_right();
#else
      return false;
#endif
    }();
    return found;
  }

#ifdef __AMX_BF16__
  // The compiler's tile instructions do not say what they read: it must have been written.
  static void in_memory(const void* data) { asm volatile("" : : "r"(data) : "memory"); }

  // As in_plain_loops; needs a Session.
  static void in_tiles(
      const Operand& rows, const at::BFloat16* panel, int64_t depth, int64_t needed, float* sums, int64_t step, bool add) {
    constexpr int64_t kTile = 16, kPanelBytes = kPanelStep * sizeof(at::BFloat16);
    const at::BFloat16 *upper = rows.x, *lower = rows.x + kTile * rows.step;
    const int64_t row_bytes = rows.step * sizeof(at::BFloat16), sum_bytes = step * sizeof(float);
    const bool both = needed > kTile;  // tiles of outputs
    in_memory(rows.x);
    if (add) {
      _tile_loadd(0, sums, sum_bytes);
      _tile_loadd(1, sums + kTile, sum_bytes);
      _tile_loadd(2, sums + kTile * step, sum_bytes);
      _tile_loadd(3, sums + kTile * step + kTile, sum_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += kInputs) {
      const at::BFloat16* weights = panel + k / 2 * kPanelStep;
      _tile_loadd(4, upper + k / kInputs * rows.inputs_step, row_bytes);
      _tile_loadd(5, lower + k / kInputs * rows.inputs_step, row_bytes);
      _tile_loadd(6, weights, kPanelBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      if (!both) continue;
      _tile_loadd(7, weights + 2 * kTile, kPanelBytes);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, sums, sum_bytes);
    _tile_stored(1, sums + kTile, sum_bytes);
    _tile_stored(2, sums + kTile * step, sum_bytes);
    _tile_stored(3, sums + kTile * step + kTile, sum_bytes);
    in_memory(sums);
  }

  static bool tiles_are_right() {
    constexpr int64_t kDepth = 2 * kInputs, kStep = kDepth + 8, kSumStep = 3 * kOutputs;  // rows and sums are parts of longer ones
    std::vector<at::BFloat16> x(kRows * kStep), panel(kOutputs * kDepth);
    for (size_t i = 0; i < x.size(); ++i) x[i] = from_float<at::BFloat16>(static_cast<float>(i * 37 % 23) - 11.0f);
    for (size_t i = 0; i < panel.size(); ++i) panel[i] = from_float<at::BFloat16>(static_cast<float>(i * 29 % 19) - 9.0f);
    std::vector<float> ours(kRows * kSumStep), plain(kRows * kSumStep);  // small integers: every sum is exact
    const Session session(true);
    bool right = true;
    for (const Operand& rows : {Operand{x.data(), kStep}, Operand{x.data(), kInputs, kInputs * kRows}}) {
      for (const bool add : {false, true}) {
        in_plain_loops(rows, panel.data(), kDepth, kOutputs, plain.data(), kSumStep, add);
        const std::vector<float> before = ours;
        in_tiles(rows, panel.data(), kDepth, kOutputs, ours.data(), kSumStep, add);
        right = right && ours == plain;
        std::vector<float> half = before;
        in_tiles(rows, panel.data(), kDepth, kOutputs / 2, half.data(), kSumStep, add);
        for (int64_t r = 0; r < kRows; ++r) {
          const auto row = half.begin() + r * kSumStep;
          right = right && std::equal(row, row + kOutputs / 2, plain.begin() + r * kSumStep);
        }
      }
    }
    return right;
  }
#endif
};

}  // namespace specmpc
