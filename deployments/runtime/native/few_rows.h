// Products of a few rows with four-bit weights, without tile registers.
//
// Those take as long for one row as for sixteen, longer than the weights take to arrive from memory. The sums are those
// of the same integers, so they are the same numbers.
#pragma once
#include "activation.h"
#include "int4.h"

namespace manta {

// Rows 0 .. kRows times half a panel. A digit is stored plus 128, hence the columns' sums 128 times too much.
template <int kRows>
inline void multiply_half(const Matrix& matrix, const Activation& input, int panel, int half,
                          float (*result)[kLane][kPanelColumns]) {
  __m512i sums[kRows][2][kVectorsPerGroup] = {};
  for (int group = 0; group < matrix.num_groups(); ++group) {
    const char* packed = matrix.group(panel, half, group);
    prefetch_lines(packed + kPrefetchBytes, kGroupBytes);
    __m512i digits[kRows][2][2];
    for (int row = 0; row < kRows; ++row)
      for (int digit = 0; digit < 2; ++digit)
        for (int part = 0; part < 2; ++part)
          digits[row][digit][part] = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(
              input.shifted_digits(row, digit) + group * kGroupInputs + part * kLane)));
    unpack_group(packed, [&](int j, __m512i first, __m512i second) {
      for (int row = 0; row < kRows; ++row)
        for (int digit = 0; digit < 2; ++digit) {
          __m512i& sum = sums[row][digit][j];
          sum = _mm512_dpbusd_epi32(sum, digits[row][digit][0], first);
          sum = _mm512_dpbusd_epi32(sum, digits[row][digit][1], second);
        }
    });
  }
  const int column = panel * kPanelColumns + half * kLane;
  const __m512i excess = _mm512_slli_epi32(_mm512_loadu_si512(matrix.column_sums + column), 7);
  for (int row = 0; row < kRows; ++row)
    for (int digit = 0; digit < 2; ++digit)
      _mm512_store_si512(&result[digit][row][half * kLane],
                         _mm512_sub_epi32(sum_columns(sums[row][digit]), excess));
}

// Up to kFewRows rows times a panel; result [digit][row][column], 4 bytes each.
inline void multiply_few(const Matrix& matrix, const Activation& input, int num_rows, int panel,
                         float (*result)[kLane][kPanelColumns]) {
  static_assert(kFewRows == 2);
  for (int half = 0; half < 2; ++half)
    num_rows == 1 ? multiply_half<1>(matrix, input, panel, half, result)
                  : multiply_half<2>(matrix, input, panel, half, result);
}

}  // namespace manta
