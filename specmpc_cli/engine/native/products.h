// Products of rows with a weight's rows, x·Wᵀ, a few dozen rows at a time, so that what follows finds them in a near cache.
//
// Two ways with one interface (int8_product.h has a third): fp32 in vector registers, and bf16 in AMX's tiles or vector registers, with
// sums in fp32. Each packs weights into panels of neighbouring outputs, in the order in which they are read. Rows may lack leading inputs,
// whose part of the product is known already. A row's sums do not depend on the rows beside it, on the number of threads or on the batch.

#pragma once

#include "rows.h"

#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AMX_BF16__
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specmpc {

// Memory that a thread keeps, from the start of a cache line on. What it held is lost when it grows.
template <typename T>
class Scratch {
 public:
  T* at_least(int64_t size) {
    constexpr size_t kLine = 64;
    if (static_cast<int64_t>(held_.size()) < size + static_cast<int64_t>(kLine / sizeof(T))) held_.resize(size + kLine / sizeof(T));
    return held_.data() + (-reinterpret_cast<uintptr_t>(held_.data()) & (kLine - 1)) / sizeof(T);
  }

 private:
  std::vector<T> held_;
};

inline int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

// What a layer hands on to the next: rows side by side.
template <typename T>
struct PlainFeatures {
  T* rows;

  PlainFeatures(int64_t count, int64_t widest) {
    static thread_local Scratch<T> scratch;
    rows = scratch.at_least(count * widest);
  }
};

// What rounding to 8 bits has to mind, and nobody else.
struct Care {
  int64_t apart = 0;  // so many leading inputs are of another kind than those after them
  bool fine = false;  // inputs that another layer makes must be nearer than 8 bits
};

// fp32. A tile of kRows × kOutputs sums stays in registers while the inputs pass.
class Fp32Product {
 public:
  using Given = float;  // weights before they are packed
  using Weight = float;  // and after
  using Features = PlainFeatures<float>;

#if defined(__AVX512F__)
  static constexpr int64_t kLanes = 16, kRows = 12;
#elif defined(__AVX__)
  static constexpr int64_t kLanes = 8, kRows = 6;
#else
  static constexpr int64_t kLanes = 4, kRows = 6;
#endif
  static constexpr int64_t kVectors = 2, kOutputs = kLanes * kVectors;

  Fp32Product(int64_t in, int64_t out, Care = {}) : in_(in), out_(out) {}

  int64_t padded_outputs() const { return round_up(out_, kLanes); }
  int64_t panels() const { return (out_ + kOutputs - 1) / kOutputs; }
  int64_t packed_size() const { return padded_outputs() * in_; }

  // weight: rows of in_ inputs, `step` apart. Within a panel, an input's weights for all outputs lie side by side.
  void pack(const float* weight, int64_t step, int64_t panel, float* packed) const {
    const int64_t first = panel * kOutputs, width = panel_width(panel), real = std::min(width, out_ - first);
    float* to = packed + first * in_;
    for (int64_t from = 0; from < in_; from += kLine) {  // line by line of each output: what is written meanwhile stays in the first cache
      const int64_t end = std::min(from + kLine, in_);
      for (int64_t j = 0; j < real; ++j) {
        const float* output = weight + (first + j) * step;
        for (int64_t k = from; k < end; ++k) to[k * width + j] = output[k];
      }
    }
    for (int64_t k = 0; k < in_; ++k) std::fill(to + k * width + real, to + (k + 1) * width, 0.0f);
  }

  // `count` rows, `step` apart, of all inputs but the first `skipped` → sums [count, padded_outputs()].
  void multiply(const float* x, int64_t step, int64_t count, int64_t skipped, const float* packed, float* sums) const {
    const int64_t passes = (in_ - skipped + kDepth - 1) / kDepth, even = (in_ - skipped + passes - 1) / passes;
    for (int64_t from = skipped; from < in_; from += even) {  // so many inputs that a panel of their weights stays in a near cache
      const int64_t depth = std::min(even, in_ - from);
      for (int64_t panel = 0; panel < panels(); ++panel) {
        const int64_t first = panel * kOutputs, width = panel_width(panel);
        const float* weights = packed + first * in_ + from * width;
        for (int64_t r = 0; r < count; r += kRows) {
          float* to = sums + r * padded_outputs() + first;
          const int64_t some = std::min(kRows, count - r);
          if (width == kOutputs) {
            tile_of<kVectors>(some, x + r * step + (from - skipped), step, depth, weights, to, from > skipped);
          } else {
            tile_of<1>(some, x + r * step + (from - skipped), step, depth, weights, to, from > skipped);
          }
        }
      }
    }
  }
  // Inputs that another layer makes, row by row.
  template <typename Make>
  void take(Features& features, int64_t r, Make make) const {
    make(features.rows + r * in_);
  }
  void multiply(const Features& features, int64_t count, const float* packed, float* sums) const {
    multiply(features.rows, in_, count, 0, packed, sums);
  }

 private:
  static constexpr int64_t kDepth = 512, kLine = 16;
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(sizeof(float)), may_alias));

  int64_t in_, out_;

  int64_t panel_width(int64_t panel) const { return std::min(kOutputs, padded_outputs() - panel * kOutputs); }

  template <int V, int R = kRows>
  void tile_of(int64_t rows, const float* x, int64_t step, int64_t depth, const float* weights, float* sums, bool add) const {
    if constexpr (R > 1) {
      if (rows < R) return tile_of<V, R - 1>(rows, x, step, depth, weights, sums, add);
    }
    tile<V, R>(x, step, depth, weights, sums, add);
  }

  template <int V, int R>
  void tile(const float* x, int64_t step, int64_t depth, const float* weights, float* sums, bool add) const {
    Vector sum[R][V] = {};
#pragma GCC unroll 2
    for (int64_t k = 0; k < depth; ++k) {
      Vector weight[V];
      for (int v = 0; v < V; ++v) weight[v] = *reinterpret_cast<const Vector*>(weights + (k * V + v) * kLanes);
      for (int r = 0; r < R; ++r) {
        for (int v = 0; v < V; ++v) sum[r][v] += x[r * step + k] * weight[v];
      }
    }
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < V; ++v) {
        Vector* to = reinterpret_cast<Vector*>(sums + r * padded_outputs() + v * kLanes);
        *to = add ? *to + sum[r][v] : sum[r][v];
      }
    }
  }
};

// bf16 with sums in fp32. Two inputs of an output lie side by side, as every processor that multiplies bf16 wants them: in AMX's tiles of
// 16 rows × 32 inputs, of which 2 × 2 are held at a time, or in vector registers, where an instruction takes a pair of inputs.
class Bf16Product {
 public:
  using Given = at::BFloat16;
  using Weight = at::BFloat16;
  using Features = PlainFeatures<at::BFloat16>;

#ifdef __AMX_BF16__
  static constexpr int64_t kRows = 32, kInputs = 32;
#else
  static constexpr int64_t kRows = 8, kInputs = 2;
#endif
  static constexpr int64_t kOutputs = 32;

  Bf16Product(int64_t in, int64_t out, Care = {}) : in_(in), out_(out), padded_in_(round_up(in, kInputs)) {}

  int64_t padded_outputs() const { return round_up(out_, kOutputs); }
  int64_t panels() const { return padded_outputs() / kOutputs; }
  int64_t packed_size() const { return padded_outputs() * padded_in_; }

  // A panel has, for each pair of inputs, the pairs of all its outputs.
  void pack(const at::BFloat16* weight, int64_t step, int64_t panel, at::BFloat16* packed) const {
    constexpr int64_t kSome = 32;  // inputs of each output in turn: what is written meanwhile stays in the first cache
    at::BFloat16* to = packed + panel * kOutputs * padded_in_;
    std::fill_n(to, kOutputs * padded_in_, at::BFloat16(0.0f));
    for (int64_t from = 0; from < in_; from += kSome) {
      const int64_t end = std::min(from + kSome, in_);
      for (int64_t j = 0; j < std::min(kOutputs, out_ - panel * kOutputs); ++j) {
        const at::BFloat16* output = weight + (panel * kOutputs + j) * step;
        for (int64_t k = from; k < end; ++k) to[k / 2 * kPanelStep + 2 * j + k % 2] = output[k];
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
#ifdef __AMX_BF16__
    if (has_tiles()) {
      const Session session;
      return multiply_by(in_tiles, rows, count, depth, weights, sums);
    }
#endif
#ifdef __AVX512BF16__
    multiply_by(in_vectors, rows, count, depth, weights, sums);
#else
    multiply_by(in_plain_loops, rows, count, depth, weights, sums);
#endif
  }

  // Inputs that another layer makes, row by row.
  template <typename Make>
  void take(Features& features, int64_t r, Make make) const {
    make(features.rows + r * in_);
  }
  void multiply(const Features& features, int64_t count, const at::BFloat16* packed, float* sums) const {
    multiply(features.rows, in_, count, 0, packed, sums);
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

  struct Operand {
    const at::BFloat16* x;
    int64_t step;
  };

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

  template <typename Tile>
  void multiply_by(Tile tile, const Operand& rows, int64_t count, int64_t depth, const at::BFloat16* weights, float* sums) const {
    for (int64_t panel = 0; panel < panels(); ++panel) {
      for (int64_t r = 0; r < count; r += kRows) {
        float* to = sums + r * padded_outputs() + panel * kOutputs;
        tile({rows.x + r * rows.step, rows.step}, weights + panel * kOutputs * padded_in_, depth, to, padded_outputs());
      }
    }
  }

  // kRows rows of `depth` inputs with one panel of weights → kOutputs sums of each row, `step` apart.
  static void in_plain_loops(const Operand& rows, const at::BFloat16* panel, int64_t depth, float* sums, int64_t step) {
    for (int64_t r = 0; r < kRows; ++r) {
      float total[kOutputs] = {};
      for (int64_t k = 0; k < depth; ++k) {
        const float value = to_float(rows.x[r * rows.step + k]);
        const at::BFloat16* weights = panel + k / 2 * kPanelStep + k % 2;
        for (int64_t j = 0; j < kOutputs; ++j) total[j] += value * to_float(weights[2 * j]);
      }
      std::copy(total, total + kOutputs, sums + r * step);
    }
  }

#ifdef __AVX512BF16__
  // As in_plain_loops; an instruction adds a pair's products for 16 outputs.
  static void in_vectors(const Operand& rows, const at::BFloat16* panel, int64_t depth, float* sums, int64_t step) {
    constexpr int64_t kHeld = 8, kLanes = 16;  // rows and outputs whose sums fill half of the registers
    for (int64_t first = 0; first < kRows; first += kHeld) {
      const at::BFloat16* x = rows.x + first * rows.step;
      __m512 sum[kHeld][2] = {};
#pragma GCC unroll 4
      for (int64_t k = 0; k < depth; k += 2) {
        const at::BFloat16* weights = panel + k / 2 * kPanelStep;
        const __m512bh left = (__m512bh)_mm512_loadu_si512(weights), right = (__m512bh)_mm512_loadu_si512(weights + 2 * kLanes);
        for (int64_t r = 0; r < kHeld; ++r) {
          int32_t pair;
          std::memcpy(&pair, x + r * rows.step + k, sizeof(pair));
          const __m512bh everywhere = (__m512bh)_mm512_set1_epi32(pair);
          sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, everywhere);
          sum[r][1] = _mm512_dpbf16_ps(sum[r][1], right, everywhere);
        }
      }
      for (int64_t r = 0; r < kHeld; ++r) {
        float* to = sums + (first + r) * step;
        _mm512_storeu_ps(to, sum[r][0]);
        _mm512_storeu_ps(to + kLanes, sum[r][1]);
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
  // While it lives, this thread's tiles are eight of 16 rows × 64 bytes.
  class Session {
   public:
    Session() {
      struct alignas(64) {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
      } config;
      in_memory(&config);
      _tile_loadconfig(&config);
    }
    ~Session() { _tile_release(); }
    Session(const Session&) = delete;
    Session& operator=(const Session&) = delete;
  };

  // The compiler's tile instructions do not say what they read: it must have been written.
  static void in_memory(const void* data) { asm volatile("" : : "r"(data) : "memory"); }

  // As in_plain_loops; needs a Session.
  static void in_tiles(const Operand& rows, const at::BFloat16* panel, int64_t depth, float* sums, int64_t step) {
    constexpr int64_t kTile = 16, kPanelBytes = kPanelStep * sizeof(at::BFloat16);
    const at::BFloat16 *upper = rows.x, *lower = rows.x + kTile * rows.step;
    const int64_t row_bytes = rows.step * sizeof(at::BFloat16), sum_bytes = step * sizeof(float);
    in_memory(rows.x);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t k = 0; k < depth; k += kInputs) {
      const at::BFloat16* weights = panel + k / 2 * kPanelStep;
      _tile_loadd(4, upper + k, row_bytes);
      _tile_loadd(5, lower + k, row_bytes);
      _tile_loadd(6, weights, kPanelBytes);
      _tile_loadd(7, weights + 2 * kTile, kPanelBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
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
    const Session session;
    in_tiles({x.data(), kStep}, panel.data(), kDepth, ours.data(), kSumStep);
    in_plain_loops({x.data(), kStep}, panel.data(), kDepth, plain.data(), kSumStep);
    return ours == plain;
  }
#endif
};

}  // namespace specmpc
