// Weights packed for AMX.
//
// A panel is 32 output columns (two result tiles side by side), stored along the inner dimension: for each step of the
// inner dimension the two 1 KB tiles that the tile registers load. A step is 32 values in bfloat16, 64 in int8; in int4
// a tile is 512 bytes and becomes an int8 tile in the cache just before it is used.
//
// Weights of 8 bits have one scale per output column. Weights of 4 bits have one per 64 inputs: each is brought to the
// column's int8 grid (step: largest scale * 8 / 127).
#pragma once
#include "arena.h"
#include "vectors.h"

namespace manta {

enum class Format : int { kBf16 = 0, kInt8 = 1, kInt4 = 2 };

constexpr int kPanelColumns = 32;
constexpr int kRatioBits = 10;         // fraction bits of a group's scale over its column's step
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
        bias(reinterpret_cast<float*>(arena.take(padded() * sizeof(float)))) {}

  static size_t bytes(Format format, int num_columns, int width) {
    return divide_up(num_columns, kPanelColumns) * panel_bytes(format, width);
  }
  static size_t all_bytes(Format format, int num_columns, int width) {
    const size_t vector = Arena::rounded(round_up(num_columns, kPanelColumns) * sizeof(float));
    return Arena::rounded(bytes(format, num_columns, width)) + 2 * vector;
  }
  static size_t panel_bytes(Format format, int width) {
    const size_t tiles = 2 * static_cast<size_t>(divide_up(width, inner_step(format)));
    return tiles * (format == Format::kInt4 ? kTileBytes / 2 + 2 * kLane : kTileBytes);
  }

  size_t unpacked_panel_bytes() const { return static_cast<size_t>(num_steps) * 2 * kTileBytes; }
  // Equal chunks, a multiple of the members, none much above kChunkBytes.
  int panels_per_chunk(int num_members) const {
    const int rounds = static_cast<int>(divide_up(num_panels, num_members) * unpacked_panel_bytes() / kChunkBytes) + 1;
    return divide_up(num_panels, num_members * rounds);
  }

  char* panel(int index) const { return tiles_ + index * panel_bytes(format, width); }
  // int4: after the panel's nibbles, 16 ratios (group scale / column step) for each tile.
  int16_t* ratios(int panel_index, int step, int half) const {
    char* after = panel(panel_index) + static_cast<size_t>(num_steps) * kTileBytes;
    return reinterpret_cast<int16_t*>(after) + (step * 2 + half) * kLane;
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
};

}  // namespace manta
