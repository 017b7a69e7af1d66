// AMX's tiles in plain C++, for machines without them. Included before the kernels, it takes the place of the instructions that they use,
// and is as strict as a processor: what would raise a fault there ends the process here.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

constexpr int kTiles = 8, kMostRows = 16, kMostBytes = 64;

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

struct State {
  Config config{};
  alignas(64) uint8_t tiles[kTiles][kMostRows][kMostBytes] = {};
};

inline State& state() {
  static thread_local State mine;
  return mine;
}

inline void require(bool right, const char* what) {
  if (right) return;
  std::fprintf(stderr, "emulated tiles: %s\n", what);
  std::abort();
}

inline bool granted = false;

// Grants a process the tiles' data; all else is the system's, for the standard library calls it, too.
template <typename... Arguments>
long call(long number, Arguments... arguments) {
  if (number != SYS_arch_prctl) return syscall(number, arguments...);
  if constexpr (sizeof...(Arguments) == 2) granted = ((arguments == 0x1023) || ...) && ((arguments == 18) || ...);
  return granted ? 0 : -1;
}

inline void load_config(const void* from) {
  require(granted, "used without the system's permission");
  Config& config = state().config;
  std::memcpy(&config, from, sizeof(config));
  require(config.palette == 1 && config.start_row == 0, "palette or first row");
  for (uint8_t byte : config.reserved) require(byte == 0, "reserved bytes");
  for (int i = 0; i < 16; ++i) {
    require(i < kTiles || (config.rows[i] == 0 && config.row_bytes[i] == 0), "a tile that there is not");
    require(config.rows[i] <= kMostRows && config.row_bytes[i] <= kMostBytes, "too large a tile");
    require((config.rows[i] == 0) == (config.row_bytes[i] == 0), "rows without bytes");
  }
  std::memset(state().tiles, 0, sizeof(state().tiles));
}

inline void release() { state().config = {}; }

inline void require_tile(int tile) {
  require(state().config.palette == 1 && state().config.rows[tile] > 0, "a tile without configuration");
}

inline void zero(int tile) {
  require_tile(tile);
  std::memset(state().tiles[tile], 0, sizeof(state().tiles[tile]));
}

inline void load(int tile, const void* from, int64_t step) {
  require_tile(tile);
  zero(tile);
  const Config& config = state().config;
  for (int r = 0; r < config.rows[tile]; ++r) {
    std::memcpy(state().tiles[tile][r], static_cast<const uint8_t*>(from) + r * step, config.row_bytes[tile]);
  }
}

inline void store(int tile, void* to, int64_t step) {
  require_tile(tile);
  const Config& config = state().config;
  for (int r = 0; r < config.rows[tile]; ++r) {
    std::memcpy(static_cast<uint8_t*>(to) + r * step, state().tiles[tile][r], config.row_bytes[tile]);
  }
}

// How many products there were, told at the end in the file that SPECMPC_EMULATED_TILES names.
struct Count {
  long products = 0;
  ~Count() {
    const char* path = std::getenv("SPECMPC_EMULATED_TILES");
    if (!path || !products) return;
    std::FILE* file = std::fopen(path, "w");
    std::fprintf(file, "%ld", products);
    std::fclose(file);
  }
};
inline Count count;

inline float widened(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof(value));
  return value;
}

// sums += left · right in bf16: left has a row's pairs of inputs, right for each pair those of all outputs.
inline void dpbf16ps(int sums, int left, int right) {
  require_tile(sums), require_tile(left), require_tile(right);
  const Config& config = state().config;
  require(config.rows[sums] == config.rows[left] && config.row_bytes[sums] == config.row_bytes[right], "sums of another shape");
  require(config.row_bytes[left] == 4 * config.rows[right] && config.row_bytes[sums] % 4 == 0, "operands of different depth");
  require(sums != left && sums != right && left != right, "the same tile twice");
  const int outputs = config.row_bytes[sums] / 4;
  for (int r = 0; r < config.rows[sums]; ++r) {
    float row[kMostBytes / 4];
    uint16_t x[kMostBytes / 2], pairs[kMostBytes / 2];
    std::memcpy(row, state().tiles[sums][r], sizeof(row));
    std::memcpy(x, state().tiles[left][r], sizeof(x));
    for (int k = 0; k < config.rows[right]; ++k) {
      std::memcpy(pairs, state().tiles[right][k], sizeof(pairs));
      const float first = widened(x[2 * k]), second = widened(x[2 * k + 1]);
      for (int j = 0; j < outputs; ++j) row[j] += first * widened(pairs[2 * j]) + second * widened(pairs[2 * j + 1]);
    }
    std::memcpy(state().tiles[sums][r], row, sizeof(row));
  }
  __atomic_add_fetch(&count.products, 1, __ATOMIC_RELAXED);
}

}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#define syscall emulated::call
#define _tile_loadconfig emulated::load_config
#define _tile_release emulated::release
#define _tile_loadd emulated::load
#define _tile_stored emulated::store
#define _tile_zero emulated::zero
#define _tile_dpbf16ps emulated::dpbf16ps
