// Weights packed for AMX.
//
// A panel is 32 output columns (two result tiles side by side), stored along the inner dimension: for each step of the
// inner dimension the two 1 KB tiles that the tile registers load. A step is 32 values in bfloat16, 64 in int8; in int4
// the left half of a panel lies before the right one, in groups of 32 inputs (int4.h) that become int8 just before use.
//
// Weights of 8 bits have one scale per output column. Weights of 4 bits have a step and a lowest value per 32 inputs,
// and are brought to the column's int8 grid (largest magnitude / 127).
#pragma once
#include "arena.h"
#include "vectors.h"

namespace manta {

inline void prefetch_lines(const char* from, int size) {
  for (int line = 0; line < size; line += 64) _mm_prefetch(from + line, _MM_HINT_T0);
}

enum class Format : int { kBf16 = 0, kInt8 = 1, kInt4 = 2 };

constexpr int kPanelColumns = 32;
constexpr int kGroupInputs = 32;       // inputs that share a step with 4 bits
constexpr int kGroupBytes = 320;       // 16 columns' nibbles, then their steps and lowest values
constexpr int kPrefetchBytes = 4096;
constexpr size_t kChunkBytes = 300000;  // weights that stay in a core's second-level cache beside what passes by

inline bool is_integer(Format format) { return format != Format::kBf16; }
inline int inner_step(Format format) { return is_integer(format) ? 64 : 32; }

class Matrix {
 public:
  Matrix(Arena& arena, Format format, int num_columns, int width)
      : format(format),
        num_columns(num_columns),
        width(width),
        num_steps(divide_up(width, inner_step(format))),
        num_panels(divide_up(num_columns, kPanelColumns)),
        tiles_(arena.take(bytes(format, num_columns, width))),
        column_scales(reinterpret_cast<float*>(arena.take(padded() * sizeof(float)))),
        bias(reinterpret_cast<float*>(arena.take(padded() * sizeof(float)))),
        column_sums(reinterpret_cast<int32_t*>(arena.take(padded() * sizeof(int32_t)))) {}

  static size_t bytes(Format format, int num_columns, int width) {
    return divide_up(num_columns, kPanelColumns) * panel_bytes(format, width);
  }
  static size_t all_bytes(Format format, int num_columns, int width) {
    const size_t vector = Arena::rounded(round_up(num_columns, kPanelColumns) * sizeof(float));
    return Arena::rounded(bytes(format, num_columns, width)) + 3 * vector;
  }
  static size_t panel_bytes(Format format, int width) {
    const size_t tiles = 2 * static_cast<size_t>(divide_up(width, inner_step(format)));
    return tiles * (format == Format::kInt4 ? 2 * kGroupBytes : kTileBytes);
  }

  size_t unpacked_panel_bytes() const { return static_cast<size_t>(num_steps) * 2 * kTileBytes; }
  // Equal chunks, a multiple of the members, none much above kChunkBytes.
  int panels_per_chunk(int num_members) const {
    const int rounds = static_cast<int>(divide_up(num_panels, num_members) * unpacked_panel_bytes() / kChunkBytes) + 1;
    return divide_up(num_panels, num_members * rounds);
  }

  char* panel(int index) const { return tiles_ + index * panel_bytes(format, width); }
  // int4: two groups a step.
  int num_groups() const { return 2 * num_steps; }
  char* group(int panel_index, int half, int index) const {
    return panel(panel_index) + static_cast<size_t>(half * num_groups() + index) * kGroupBytes;
  }

  const Format format;
  const int num_columns;
  const int width;
  const int num_steps;
  const int num_panels;

 private:
  size_t padded() const { return static_cast<size_t>(num_panels) * kPanelColumns; }
  char* const tiles_;

 public:
  float* const column_scales;
  float* const bias;
  int32_t* const column_sums;  // int4: over a column's int8 values
};

}  // namespace manta
