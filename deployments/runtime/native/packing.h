// Checkpoint tensors, one row per output feature, into a Matrix; done once per tensor, at load.
#pragma once
#include <math.h>

#include <algorithm>

#include "int4.h"

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

// Sixteen rows of nibbles as the groups of half a panel; see int4.h.
class NibblePacker {
 public:
  // `source` holds 0 .. 15; `steps` and `lowest` one number per row and group.
  NibblePacker(const Matrix& matrix, int panel, int half, const int8_t* source, const float* steps, const float* lowest)
      : matrix_(matrix), panel_(panel), half_(half), source_(source), steps_(steps), lowest_(lowest) {}

  // Row `row` of the source as column `column` of the half panel.
  void pack(int row, int column) const {
    const int num_groups = divide_up(matrix_.width, kGroupInputs);
    const float* steps = steps_ + static_cast<size_t>(row) * num_groups;
    const float* lowest = lowest_ + static_cast<size_t>(row) * num_groups;
    const float grid = largest(steps, lowest, num_groups) / 127;
    matrix_.column_scales[first_column() + column] = grid;
    for (int group = 0; group < num_groups; ++group) {
      char* packed = matrix_.group(panel_, half_, group);
      pack_values(source_ + static_cast<size_t>(row) * matrix_.width, group, column, packed);
      int16_t* lane = reinterpret_cast<int16_t*>(packed + kVectorsPerGroup * kVectorBytes) + column / 4 * 8;
      lane[column % 4] = fixed(steps[group], grid, kStepBits);
      lane[4 + column % 4] = static_cast<int16_t>(fixed(lowest[group], grid, kValueBits) + (1 << kValueBits) / 2);
    }
  }

  // When all its columns are packed.
  void sum() const {
    __m512i sums[kVectorsPerGroup] = {};
    const __m512i one = _mm512_set1_epi8(1);
    for (int group = 0; group < matrix_.num_groups(); ++group)
      unpack_group(matrix_.group(panel_, half_, group), [&](int j, __m512i first, __m512i second) {
        sums[j] = _mm512_dpbusd_epi32(_mm512_dpbusd_epi32(sums[j], one, first), one, second);
      });
    _mm512_storeu_si512(matrix_.column_sums + first_column(), sum_columns(sums));
  }

 private:
  int first_column() const { return panel_ * kPanelColumns + half_ * kLane; }

  static float largest(const float* steps, const float* lowest, int num_groups) {
    float found = 0.0f;
    for (int group = 0; group < num_groups; ++group)
      found = std::max({found, fabsf(lowest[group]), fabsf(lowest[group] + 15 * steps[group])});
    return found;
  }

  static int16_t fixed(float value, float grid, int fraction_bits) {
    return grid > 0 ? static_cast<int16_t>(lrintf(value / grid * (1 << fraction_bits))) : int16_t{0};
  }

  void pack_values(const int8_t* values, int group, int column, char* packed) const {
    char* lane = packed + column % 4 * kVectorBytes + column / 4 * kLane;
    for (int k = 0; k < std::min(kGroupInputs, matrix_.width - group * kGroupInputs); ++k)
      lane[k % kLane] |= static_cast<char>(values[group * kGroupInputs + k] << (k < kLane ? 0 : 4));
  }

  const Matrix& matrix_;
  const int panel_, half_;
  const int8_t* const source_;
  const float* const steps_;
  const float* const lowest_;
};

// Where a tensor stands in a fused matrix: its first tile column, and the distance to the next (2 where another
// tensor's columns alternate with its own).
struct Place {
  int first, stride;
};

// `data` is bfloat16, or int8 with `scales` ([num_rows], or [num_rows, groups] for int4, which also has `minima`).
inline void pack(const Matrix& matrix, Place place, const void* data, const float* scales, const float* minima,
                 int num_rows) {
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
      const NibblePacker packer(matrix, panel, half, static_cast<const int8_t*>(data), scales, minima);
      for (int each = 0; each < std::min(kLane, num_rows - row); ++each) packer.pack(row + each, each);
      packer.sum();
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
