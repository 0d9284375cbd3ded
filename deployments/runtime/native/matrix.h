// Weights packed for AMX, activations in the same order, and their product.
//
// A panel is 32 output columns (two result tiles side by side), stored along the inner dimension: for each step of the
// inner dimension the two 1 KB tiles that the tile registers load. A step is 32 values in bfloat16, 64 in int8; in int4
// a tile is 512 bytes and becomes an int8 tile in the cache just before it is used.
//
// Integer products: activations are rounded to 15 bits per row, held as two int8 digits (128 * high + low), so that
// only the weights' rounding costs accuracy; sums are exact. Weights of 8 bits have one scale per output column.
// Weights of 4 bits have one per 64 inputs: each is brought to the column's int8 grid (step: largest scale * 8 / 127).
//
// A row's result depends on that row and the weights alone: the order of the sum never changes.
#pragma once
#include <algorithm>
#include <stdexcept>

#include "arena.h"
#include "team.h"
#include "vectors.h"

namespace manta {

enum class Format : int { kBf16 = 0, kInt8 = 1, kInt4 = 2 };

constexpr int kPanelColumns = 32;
constexpr int kRatioBits = 10;  // fraction bits of a group's scale over its column's step

inline bool is_integer(Format format) { return format != Format::kBf16; }
inline int inner_step(Format format) { return is_integer(format) ? 64 : 32; }

// --- activations -----------------------------------------------------------------------------------------------

// The left side of a product: rows of `width` values, tiled as the registers load them.
class Activation {
 public:
  Activation(int width, bool integer)
      : integer(integer), width(width), num_steps(divide_up(width, integer ? 64 : 32)) {}

  void reserve(int num_rows) {
    const int blocks = divide_up(num_rows, kLane);
    tiles_.resize(static_cast<size_t>(blocks) * block_bytes());
    if (!integer) return;
    scales_.resize(static_cast<size_t>(blocks) * kLane * sizeof(float));
    staging_.resize(static_cast<size_t>(blocks) * kLane * width * sizeof(float));
  }

  // Tiles of 16 rows: bfloat16, or the high digits followed by the low ones.
  const char* block(int index) const { return tiles_.data() + index * block_bytes(); }
  const char* low_digits(int index) const { return block(index) + num_steps * kTileBytes; }
  const float* scales(int block) const { return reinterpret_cast<const float*>(scales_.data()) + block * kLane; }

  // Sixteen values of a row from `column` (a multiple of 16).
  void store(int row, int column, __m512 values) {
    if (integer) {
      _mm512_storeu_ps(staging(row) + column, values);
    } else {
      char* at = tile_row(row, column / 32) + column % 32 * 2;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), to_bf16(values));
    }
  }

  // Rounds a stored row to its two digits; nothing to do in bfloat16.
  void seal(int row) {
    if (!integer) return;
    const float* source = staging(row);
    __m512 largest = _mm512_setzero_ps();
    for (int k = 0; k < width; k += kLane) largest = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(source + k)), largest);
    const float top = _mm512_reduce_max_ps(largest);
    reinterpret_cast<float*>(scales_.data())[row] = top / kLargest;
    const __m512 inverse = _mm512_set1_ps(top > 0 ? kLargest / top : 0.0f);
    for (int k = 0; k < width; k += kLane) {
      const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(source + k), inverse));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(64)), 7);
      const __m512i low = _mm512_sub_epi32(value, _mm512_slli_epi32(high, 7));
      char* at = tile_row(row, k / 64) + k % 64;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(at + num_steps * kTileBytes), _mm512_cvtepi32_epi8(low));
    }
  }

  const bool integer;
  const int width;
  const int num_steps;

 private:
  static constexpr float kLargest = 127 * 128;

  size_t block_bytes() const { return static_cast<size_t>(num_steps) * kTileBytes * (integer ? 2 : 1); }
  char* tile_row(int row, int step) {
    return tiles_.data() + row / kLane * block_bytes() + step * kTileBytes + row % kLane * 64;
  }
  float* staging(int row) { return reinterpret_cast<float*>(staging_.data()) + static_cast<size_t>(row) * width; }

  Buffer tiles_, scales_, staging_;
};

// --- weights ---------------------------------------------------------------------------------------------------

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

// --- product ---------------------------------------------------------------------------------------------------

constexpr int kPrefetchBytes = 4096;
constexpr int kCacheRows = 128;
constexpr int kChunkPanels = 4;

// Registers for products of up to `num_rows` rows: 0-3 results, 4 and 5 left, 6 and 7 right sides.
inline void configure_product(int num_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.rows[tile] = static_cast<uint8_t>(tile < 6 ? std::clamp(num_rows, 1, kLane) : kLane);
    config.row_bytes[tile] = 64;
  }
  load_configuration(config);
}

// The register names must be literal: the compiler's intrinsics paste them into the instruction.
#define MANTA_ACCUMULATE(result, left, right)  \
  if constexpr (kInteger) {                    \
    _tile_dpbssd(result, left, right);         \
  } else {                                     \
    _tile_dpbf16ps(result, left, right);       \
  }

inline __m512 join_digits(const float (*result)[kLane][kPanelColumns], int row, int column) {
  const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(&result[0][row][column]));
  const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(&result[1][row][column]));
  return _mm512_fmadd_ps(high, _mm512_set1_ps(128.0f), low);
}

// One or two blocks of 16 rows times one panel; result [kBlocks][16][32], 4 bytes each.
template <bool kInteger, int kBlocks>
inline void multiply_panel(const char* left0, const char* left1, const char* panel, int num_steps, bool prefetch,
                           void* result) {
  finish_stores();
  _tile_zero(0);
  _tile_zero(1);
  if constexpr (kBlocks == 2) {
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < num_steps; ++step) {
    const char* right = panel + static_cast<size_t>(step) * 2 * kTileBytes;
    if (prefetch) {
      for (int line = 0; line < 2 * kTileBytes; line += 64) _mm_prefetch(right + kPrefetchBytes + line, _MM_HINT_T0);
    }
    _tile_loadd(4, left0 + step * kTileBytes, 64);
    _tile_loadd(6, right, 64);
    MANTA_ACCUMULATE(0, 4, 6)
    _tile_loadd(7, right + kTileBytes, 64);
    MANTA_ACCUMULATE(1, 4, 7)
    if constexpr (kBlocks == 2) {
      _tile_loadd(5, left1 + step * kTileBytes, 64);
      MANTA_ACCUMULATE(2, 5, 6)
      MANTA_ACCUMULATE(3, 5, 7)
    }
  }
  char* out = static_cast<char*>(result);
  _tile_stored(0, out, 128);
  _tile_stored(1, out + 64, 128);
  if constexpr (kBlocks == 2) {
    _tile_stored(2, out + 16 * 128, 128);
    _tile_stored(3, out + 16 * 128 + 64, 128);
  }
}

// What unpack_panel needs and no tile changes: which column a byte belongs to, and the sixteen values of a nibble.
struct UnpackTables {
  alignas(64) uint8_t column[64];        // column % 8 of a byte, times 8
  alignas(64) int16_t spread[4][32];     // columns 0 2 4 6 | 1 3 5 7 | 8 .. | 9 .., each eight times
  alignas(64) int16_t positive[32];      // 0 .. 7, times 2^(15 - kRatioBits)
  alignas(64) int16_t negative[32];      // -8 .. -1, likewise

  UnpackTables() {
    for (int byte = 0; byte < 64; ++byte) column[byte] = static_cast<uint8_t>(byte / 4 % 16 << 3);
    for (int word = 0; word < 32; ++word) {
      for (int part = 0; part < 4; ++part) spread[part][word] = static_cast<int16_t>(part / 2 * 8 + word / 8 * 2 + part % 2);
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

inline void unpack_panel(const Matrix& matrix, int panel, char* out) {
  const char* nibbles = matrix.panel(panel);
  for (int tile = 0; tile < 2 * matrix.num_steps; ++tile) {
    for (int line = 0; line < kTileBytes / 2; line += 64)
      _mm_prefetch(nibbles + tile * (kTileBytes / 2) + kPrefetchBytes + line, _MM_HINT_T0);
    unpack_tile(nibbles + tile * (kTileBytes / 2), matrix.ratios(panel, tile / 2, tile % 2), out + tile * kTileBytes);
  }
}

// Rows `first .. stop` times a panel; calls emit(row, panel, left, right) with the sixteen results of both halves, bias
// included. `first` is a multiple of 32.
template <bool kInteger, class Emit>
void multiply_rows(const Matrix& matrix, const Activation& input, int first, int stop, int panel, const char* tiles,
                   const Emit& emit) {
  alignas(64) float result[2][kLane][kPanelColumns];
  const float* bias = matrix.bias + panel * kPanelColumns;
  const __m512 bias_left = _mm512_loadu_ps(bias), bias_right = _mm512_loadu_ps(bias + kLane);
  constexpr int kRows = kInteger ? kLane : 2 * kLane;  // at a time
  const bool stream = matrix.format != Format::kInt4 && first == 0;
  for (int row = first; row < stop; row += kRows) {
    const int block = row / kLane, rows = std::min(stop - row, kRows);
    const bool prefetch = stream && row == first;
    if constexpr (kInteger) {
      multiply_panel<true, 2>(input.block(block), input.low_digits(block), tiles, matrix.num_steps, prefetch, result);
    } else if (rows <= kLane) {
      multiply_panel<false, 1>(input.block(block), nullptr, tiles, matrix.num_steps, prefetch, result);
    } else {
      multiply_panel<false, 2>(input.block(block), input.block(block + 1), tiles, matrix.num_steps, prefetch, result);
    }
    for (int each = 0; each < rows; ++each) {
      __m512 left, right;
      if constexpr (kInteger) {
        const float* scales = matrix.column_scales + panel * kPanelColumns;
        const __m512 scale = _mm512_set1_ps(input.scales(block)[each]);
        left = _mm512_mul_ps(_mm512_mul_ps(join_digits(result, each, 0), scale), _mm512_loadu_ps(scales));
        right = _mm512_mul_ps(_mm512_mul_ps(join_digits(result, each, kLane), scale), _mm512_loadu_ps(scales + kLane));
      } else {
        left = _mm512_load_ps(&result[each / kLane][each % kLane][0]);
        right = _mm512_load_ps(&result[each / kLane][each % kLane][kLane]);
      }
      emit(row + each, panel, _mm512_add_ps(left, bias_left), _mm512_add_ps(right, bias_right));
    }
  }
}

// The product of `num_rows` sealed rows with a whole matrix, shared by the members; see multiply_rows for `emit`.
// `scratch` is the member's own, of at least kChunkPanels unpacked panels. With many rows, a chunk's panels and 128 rows
// at a time stay in the second-level cache.
template <class Emit>
void multiply(Member& member, const Matrix& matrix, const Activation& input, int num_rows, char* scratch,
              const Emit& emit) {
  const int chunk_panels = num_rows > kCacheRows ? kChunkPanels : 1;
  const size_t unpacked = static_cast<size_t>(matrix.num_steps) * 2 * kTileBytes;
  member.share(divide_up(matrix.num_panels, chunk_panels), [&](int chunk) {
    const int from = chunk * chunk_panels, to = std::min(matrix.num_panels, from + chunk_panels);
    const bool unpacks = matrix.format == Format::kInt4;
    for (int panel = from; unpacks && panel < to; ++panel) unpack_panel(matrix, panel, scratch + (panel - from) * unpacked);
    for (int first = 0; first < num_rows; first += kCacheRows) {
      const int stop = std::min(num_rows, first + kCacheRows);
      for (int panel = from; panel < to; ++panel) {
        const char* tiles = unpacks ? scratch + (panel - from) * unpacked : matrix.panel(panel);
        if (is_integer(matrix.format)) {
          multiply_rows<true>(matrix, input, first, stop, panel, tiles, emit);
        } else {
          multiply_rows<false>(matrix, input, first, stop, panel, tiles, emit);
        }
      }
    }
  });
}

}  // namespace manta
