// Checkpoint tensors, one row per output feature, into a Matrix; done once per tensor, at load.
#pragma once
#include <math.h>

#include "matrix.h"

namespace manta {

// Rows `row .. row + 16` of an array as one tile column of `matrix`, at the panel's left or right half.
// A tile is sixteen rows of sixteen cells; a cell is four bytes of one row of the array: two bfloat16 or four int8.
inline void pack_tiles(const Matrix& matrix, int panel, int half, const char* source, size_t row_bytes, int row,
                       int num_rows) {
  constexpr size_t kStepBytes = 64;
  for (int column = 0; column < kLane && row + column < num_rows; ++column) {
    const char* from = source + (row + column) * row_bytes;
    for (int step = 0; step < matrix.num_steps; ++step) {
      char* tile = matrix.panel(panel) + (step * 2 + half) * size_t{kTileBytes};
      const size_t start = step * kStepBytes, size = std::min(kStepBytes, row_bytes - start);
      for (size_t byte = 0; byte < size; byte += 4) memcpy(tile + byte * kLane + column * 4, from + start + byte, 4);
    }
  }
}

// The same for values of -8 .. 7 with one scale per row and 64 columns.
inline void pack_nibbles(const Matrix& matrix, int panel, int half, const int8_t* source, const float* scales, int row,
                         int num_rows) {
  for (int column = 0; column < kLane && row + column < num_rows; ++column) {
    const int8_t* from = source + static_cast<size_t>(row + column) * matrix.width;
    const float* groups = scales + static_cast<size_t>(row + column) * matrix.num_steps;
    float largest = 0.0f;
    for (int step = 0; step < matrix.num_steps; ++step) largest = std::max(largest, fabsf(groups[step]));
    const float grid = largest * 8 / 127;
    matrix.column_scales[panel * kPanelColumns + half * kLane + column] = grid;
    for (int step = 0; step < matrix.num_steps; ++step) {
      const float ratio = grid > 0 ? groups[step] / grid : 0.0f;
      matrix.ratios(panel, step, half)[column] = static_cast<int16_t>(lrintf(ratio * (1 << kRatioBits)));
      char* tile = matrix.panel(panel) + (step * 2 + half) * size_t{kTileBytes / 2};
      for (int k = step * 64; k < std::min(matrix.width, (step + 1) * 64); ++k) {
        const int tile_row = k % 64 / 4;
        char& byte = tile[tile_row % 8 * 64 + column * 4 + k % 4];
        const int nibble = from[k] & 15;
        byte = static_cast<char>(tile_row < 8 ? byte | nibble : byte | nibble << 4);
      }
    }
  }
}

// Where a tensor stands in a fused matrix: its first tile column, and the distance to the next (2 where another
// tensor's columns alternate with its own).
struct Place {
  int first, stride;
};

// `data` is bfloat16, or int8 with `scales` ([num_rows], or [num_rows, width / 64] for int4).
inline void pack(const Matrix& matrix, Place place, const void* data, const float* scales, int num_rows) {
  for (int row = 0; row < num_rows; row += kLane) {
    const int column = place.first + row / kLane * place.stride;
    const int panel = column / 2, half = column % 2;
    if (matrix.format == Format::kBf16) {
      pack_tiles(matrix, panel, half, static_cast<const char*>(data), size_t{2} * matrix.width, row, num_rows);
    } else if (matrix.format == Format::kInt8) {
      pack_tiles(matrix, panel, half, static_cast<const char*>(data), matrix.width, row, num_rows);
      for (int each = 0; each < std::min(kLane, num_rows - row); ++each)
        matrix.column_scales[column * kLane + each] = scales[row + each];
    } else {
      pack_nibbles(matrix, panel, half, static_cast<const int8_t*>(data), scales, row, num_rows);
    }
  }
}

inline void pack_bias(const Matrix& matrix, Place place, const float* data, int num_rows) {
  for (int row = 0; row < num_rows; ++row)
    matrix.bias[(place.first + row / kLane * place.stride) * kLane + row % kLane] = data[row];
}

// A row of a bfloat16 matrix, read back.
inline void unpack_row(const Matrix& matrix, int row, float* out) {
  const char* panel = matrix.panel(row / kPanelColumns);
  const int half = row % kPanelColumns / kLane, column = row % kLane;
  for (int k = 0; k < matrix.width; ++k) {
    const char* tile = panel + (k / 32 * 2 + half) * size_t{kTileBytes};
    uint16_t bits;
    memcpy(&bits, tile + k % 32 / 2 * 64 + column * 4 + k % 2 * 2, 2);
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    memcpy(out + k, &wide, 4);
  }
}

}  // namespace manta
