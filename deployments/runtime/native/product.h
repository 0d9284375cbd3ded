// Activations times a packed matrix.
//
// A row's result depends on that row and the weights alone: the order of the sum never changes.
#pragma once
#include <algorithm>

#include "few_rows.h"
#include "team.h"

namespace manta {

constexpr int kBlockRows = 32;

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

// One or two blocks of 16 rows times one panel; result [kBlocks][16][32], 4 bytes each. before(step) may bring near what
// lies ahead.
template <bool kInteger, int kBlocks, class Before>
inline void multiply_panel(const char* left0, const char* left1, const char* panel, int num_steps, const Before& before,
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
    before(step);
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

// Both tiles of one step of a panel; what lies ahead in memory is asked for.
inline void unpack_step(const Matrix& matrix, int panel, int step, char* out) {
  char* tiles = out + static_cast<size_t>(step) * 2 * kTileBytes;
  for (int half = 0; half < 2; ++half) {
    const char* groups = matrix.group(panel, half, 2 * step);
    prefetch_lines(groups + kPrefetchBytes, 2 * kGroupBytes);
    unpack_to_tile(groups, tiles + half * kTileBytes);
    unpack_to_tile(groups + kGroupBytes, tiles + half * kTileBytes + kTileBytes / 2);
  }
  finish_stores();
}

// The 16 results of both halves of a panel in one row, bias and scales included.
struct PanelRow {
  __m512 left, right;
};

template <bool kInteger>
inline PanelRow finish_row(const Matrix& matrix, const Activation& input, int row, int panel,
                           const float (*result)[kLane][kPanelColumns], int at) {
  const float* bias = matrix.bias + panel * kPanelColumns;
  PanelRow made;
  if constexpr (kInteger) {
    const float* scales = matrix.column_scales + panel * kPanelColumns;
    const __m512 scale = _mm512_set1_ps(input.scale(row));
    made.left = _mm512_mul_ps(_mm512_mul_ps(join_digits(result, at, 0), scale), _mm512_loadu_ps(scales));
    made.right = _mm512_mul_ps(_mm512_mul_ps(join_digits(result, at, kLane), scale), _mm512_loadu_ps(scales + kLane));
  } else {
    made.left = _mm512_load_ps(&result[at / kLane][at % kLane][0]);
    made.right = _mm512_load_ps(&result[at / kLane][at % kLane][kLane]);
  }
  made.left = _mm512_add_ps(made.left, _mm512_loadu_ps(bias));
  made.right = _mm512_add_ps(made.right, _mm512_loadu_ps(bias + kLane));
  return made;
}

// Rows `first .. stop` (at most 32, `first` a multiple of 32) times a panel; calls emit(row, panel, left, right).
template <bool kInteger, class Before, class Emit>
void multiply_rows(const Matrix& matrix, const Activation& input, int first, int stop, int panel, const char* tiles,
                   const Before& before, const Emit& emit) {
  alignas(64) float result[2][kLane][kPanelColumns];
  const int block = first / kLane, num_steps = matrix.num_steps;
  const auto emit_rows = [&](int from, int to) {
    for (int row = from; row < to; ++row) {
      const PanelRow made = finish_row<kInteger>(matrix, input, row, panel, result, row - from);
      emit(row, panel, made.left, made.right);
    }
  };
  if constexpr (kInteger) {
    multiply_panel<true, 2>(input.block(block), input.low_digits(block), tiles, num_steps, before, result);
    emit_rows(first, std::min(stop, first + kLane));
    if (stop <= first + kLane) return;
    multiply_panel<true, 2>(input.block(block + 1), input.low_digits(block + 1), tiles, num_steps, [](int) {}, result);
    emit_rows(first + kLane, stop);
  } else if (stop - first <= kLane) {
    multiply_panel<false, 1>(input.block(block), nullptr, tiles, num_steps, before, result);
    emit_rows(first, stop);
  } else {
    multiply_panel<false, 2>(input.block(block), input.block(block + 1), tiles, num_steps, before, result);
    emit_rows(first, stop);
  }
}

// Prefetches ahead, from memory or the second-level cache; of int4 the first rows unpack ahead into `scratch`.
template <class Emit>
void multiply_block(const Matrix& matrix, const Activation& input, int first, int stop, int panel, char* scratch,
                    const Emit& emit) {
  const auto nothing = [](int) {};
  if (matrix.format == Format::kInt4) {
    if (first > 0) return multiply_rows<true>(matrix, input, first, stop, panel, scratch, nothing, emit);
    unpack_step(matrix, panel, 0, scratch);
    const auto unpack_next = [&](int step) {
      if (step + 1 < matrix.num_steps) unpack_step(matrix, panel, step + 1, scratch);
    };
    return multiply_rows<true>(matrix, input, first, stop, panel, scratch, unpack_next, emit);
  }
  const char* tiles = matrix.panel(panel);
  const auto prefetch = [&](int step) {
    prefetch_lines(tiles + static_cast<size_t>(step) * 2 * kTileBytes + kPrefetchBytes, 2 * kTileBytes);
  };
  if (matrix.format == Format::kInt8)
    return multiply_rows<true>(matrix, input, first, stop, panel, tiles, prefetch, emit);
  return multiply_rows<false>(matrix, input, first, stop, panel, tiles, prefetch, emit);
}

template <class Emit>
void multiply_few_rows(const Matrix& matrix, const Activation& input, int num_rows, int panel, const Emit& emit) {
  alignas(64) float result[2][kLane][kPanelColumns];
  multiply_few(matrix, input, num_rows, panel, result);
  for (int row = 0; row < num_rows; ++row) {
    const PanelRow made = finish_row<true>(matrix, input, row, panel, result, row);
    emit(row, panel, made.left, made.right);
  }
}

// The product of `num_rows` sealed rows with a whole matrix, shared by the members; see multiply_rows for `emit`.
// `scratch` is the member's own, for the unpacked panels of a chunk. With many rows, a chunk's panels stay in the
// second-level cache while the rows pass by, 32 at a time.
template <class Emit>
void multiply(Member& member, const Matrix& matrix, const Activation& input, int num_rows, char* scratch,
              const Emit& emit) {
  if (matrix.format == Format::kInt4 && num_rows <= kFewRows)
    return member.share(matrix.num_panels,
                        [&](int panel) { multiply_few_rows(matrix, input, num_rows, panel, emit); });
  const size_t unpacked = matrix.unpacked_panel_bytes();
  const int chunk_panels = num_rows > kBlockRows ? matrix.panels_per_chunk(member.num_members) : 1;
  member.share(divide_up(matrix.num_panels, chunk_panels), [&](int chunk) {
    const int from = chunk * chunk_panels, to = std::min(matrix.num_panels, from + chunk_panels);
    for (int first = 0; first < num_rows; first += kBlockRows)
      for (int panel = from; panel < to; ++panel)
        multiply_block(matrix, input, first, std::min(num_rows, first + kBlockRows), panel,
                       scratch + (panel - from) * unpacked, emit);
  });
}

}  // namespace manta
