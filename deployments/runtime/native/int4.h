// Groups of four-bit weights become int8, by table look-up.
//
// A group is 16 columns times 32 inputs. Vector j of its nibbles has column 4 l + j in its 128-bit lane l: inputs
// 0 .. 15 in the low four bits, 16 .. 31 in the high ones. Lane l of the vector behind them has the steps of columns
// 4 l .. 4 l + 3, in 1 / 1024 of the column's int8 grid, then their lowest values plus a half, in 1 / 16 of it.
#pragma once
#include "matrix.h"

namespace manta {

constexpr int kStepBits = 10, kValueBits = 4;  // fraction bits of a step and of a value, in units of the column's grid
constexpr int kVectorBytes = 64;
constexpr int kVectorsPerGroup = 4;  // of nibbles; and of int8 values for 16 inputs

// Which words of a lane are a column's step and lowest value, and the sixteen values of a nibble.
struct Int4Tables {
  alignas(64) uint8_t step[kVectorsPerGroup][64], lowest[kVectorsPerGroup][64];
  alignas(64) int16_t small[32], large[32];  // 0 .. 7 and 8 .. 15 in each lane, so that a product has kValueBits

  Int4Tables() {
    for (int byte = 0; byte < 64; ++byte) {
      for (int j = 0; j < kVectorsPerGroup; ++j) {
        step[j][byte] = static_cast<uint8_t>(2 * j + byte % 2);
        lowest[j][byte] = static_cast<uint8_t>(8 + 2 * j + byte % 2);
      }
    }
    for (int word = 0; word < 32; ++word) {
      small[word] = static_cast<int16_t>(word % 8 << (15 - kStepBits + kValueBits));
      large[word] = static_cast<int16_t>((word % 8 + 8) << (15 - kStepBits + kValueBits));
    }
  }
};
inline const Int4Tables kInt4;

// The int8 values that the sixteen nibbles stand for in the columns of vector `j`, a lane each.
inline __m512i value_table(__m512i parameters, int j) {
  const __m512i step = _mm512_shuffle_epi8(parameters, _mm512_load_si512(kInt4.step[j]));
  const __m512i lowest = _mm512_shuffle_epi8(parameters, _mm512_load_si512(kInt4.lowest[j]));
  const __m512i small = _mm512_add_epi16(_mm512_mulhrs_epi16(step, _mm512_load_si512(kInt4.small)), lowest);
  const __m512i large = _mm512_add_epi16(_mm512_mulhrs_epi16(step, _mm512_load_si512(kInt4.large)), lowest);
  return _mm512_packs_epi16(_mm512_srai_epi16(small, kValueBits), _mm512_srai_epi16(large, kValueBits));
}

// Calls use(j, first, second) with vector j's int8 values for inputs 0 .. 15 and 16 .. 31.
template <class Use>
inline void unpack_group(const char* group, const Use& use) {
  const __m512i parameters = _mm512_load_si512(group + kVectorsPerGroup * kVectorBytes);
  const __m512i nibble = _mm512_set1_epi8(15);
#pragma GCC unroll 4
  for (int j = 0; j < kVectorsPerGroup; ++j) {
    const __m512i table = value_table(parameters, j), both = _mm512_load_si512(group + j * kVectorBytes);
    use(j, _mm512_shuffle_epi8(table, _mm512_and_si512(both, nibble)),
        _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(both, 4), nibble)));
  }
}

// Four vectors whose lanes are columns (column 4 l + j in lane l of vector j) become four with one cell of every
// column, in order.
inline void columns_to_rows(__m512i* vectors) {
  const __m512i a = _mm512_unpacklo_epi32(vectors[0], vectors[1]), b = _mm512_unpackhi_epi32(vectors[0], vectors[1]);
  const __m512i c = _mm512_unpacklo_epi32(vectors[2], vectors[3]), d = _mm512_unpackhi_epi32(vectors[2], vectors[3]);
  vectors[0] = _mm512_unpacklo_epi64(a, c);
  vectors[1] = _mm512_unpackhi_epi64(a, c);
  vectors[2] = _mm512_unpacklo_epi64(b, d);
  vectors[3] = _mm512_unpackhi_epi64(b, d);
}

// The sums over each column's cells.
inline __m512i sum_columns(__m512i* vectors) {
  columns_to_rows(vectors);
  return _mm512_add_epi32(_mm512_add_epi32(vectors[0], vectors[1]), _mm512_add_epi32(vectors[2], vectors[3]));
}

// A group becomes half an int8 tile, eight rows.
inline void unpack_to_tile(const char* group, char* out) {
  __m512i values[2][kVectorsPerGroup];
  unpack_group(group, [&](int j, __m512i first, __m512i second) {
    values[0][j] = first;
    values[1][j] = second;
  });
#pragma GCC unroll 2
  for (int part = 0; part < 2; ++part) {
    columns_to_rows(values[part]);
#pragma GCC unroll 4
    for (int row = 0; row < kVectorsPerGroup; ++row)
      _mm512_store_si512(out + (part * kVectorsPerGroup + row) * kVectorBytes, values[part][row]);
  }
}

}  // namespace manta
