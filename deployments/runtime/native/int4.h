// Tiles of four-bit weights become tiles of int8, by table look-up.
#pragma once
#include "matrix.h"

namespace manta {

// What unpack_panel needs and no tile changes: which column a byte belongs to, and the sixteen values of a nibble.
struct UnpackTables {
  alignas(64) uint8_t column[64];        // column % 8 of a byte, times 8
  alignas(64) int16_t spread[4][32];     // columns 0 2 4 6 | 1 3 5 7 | 8 .. | 9 .., each eight times
  alignas(64) int16_t positive[32];      // 0 .. 7, times 2^(15 - kRatioBits)
  alignas(64) int16_t negative[32];      // -8 .. -1, likewise

  UnpackTables() {
    for (int byte = 0; byte < 64; ++byte) column[byte] = static_cast<uint8_t>(byte / 4 % 16 << 3);
    for (int word = 0; word < 32; ++word) {
      for (int part = 0; part < 4; ++part)
        spread[part][word] = static_cast<int16_t>(part / 2 * 8 + word / 8 * 2 + part % 2);
      positive[word] = static_cast<int16_t>(word % 8 * (1 << (15 - kRatioBits)));
      negative[word] = static_cast<int16_t>((word % 8 - 8) * (1 << (15 - kRatioBits)));
    }
  }
};
inline const UnpackTables kUnpack;

// The int8 values of the nibbles 0 .. 7 (or 8 .. 15) in sixteen columns, eight bytes a column.
struct NibbleTable {
  __m512i low, high;

  NibbleTable(const __m512i* columns, __m512i values)
      : low(_mm512_packs_epi16(_mm512_mulhrs_epi16(columns[0], values), _mm512_mulhrs_epi16(columns[1], values))),
        high(_mm512_packs_epi16(_mm512_mulhrs_epi16(columns[2], values), _mm512_mulhrs_epi16(columns[3], values))) {}

  __m512i at(__m512i index) const { return _mm512_permutex2var_epi8(low, index, high); }
};

// One int4 tile -> one int8 tile. Byte r * 64 + c holds row r in its low four bits and row r + 8 in its high ones, as
// two's complement; each value becomes round(value * ratio of its column).
inline void unpack_tile(const char* nibbles, const int16_t* ratios, char* out) {
  const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(ratios)));
  __m512i columns[4];
  for (int part = 0; part < 4; ++part)
    columns[part] = _mm512_permutexvar_epi16(_mm512_load_si512(kUnpack.spread[part]), all);
  const NibbleTable positive(columns, _mm512_load_si512(kUnpack.positive));
  const NibbleTable negative(columns, _mm512_load_si512(kUnpack.negative));
  const __m512i column = _mm512_load_si512(kUnpack.column);
  const __m512i seven = _mm512_set1_epi8(7);
  for (int row = 0; row < 8; ++row) {
    const __m512i both = _mm512_loadu_si512(nibbles + row * 64);
    for (int half = 0; half < 2; ++half) {
      const __m512i nibble = half == 0 ? both : _mm512_srli_epi16(both, 4);
      const __m512i index = _mm512_ternarylogic_epi32(nibble, seven, column, 0xEA);  // (nibble & 7) | column
      const __mmask64 is_negative = _mm512_test_epi8_mask(nibble, _mm512_set1_epi8(8));
      const __m512i value = _mm512_mask_blend_epi8(is_negative, positive.at(index), negative.at(index));
      _mm512_storeu_si512(out + (row + half * 8) * 64, value);
    }
  }
}

}  // namespace manta
