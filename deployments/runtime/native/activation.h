// The left side of a product: rows of activations, rounded and tiled as the registers load them.
//
// In bfloat16, or for integer products as 15 bits per row in two int8 digits (128 * high + low), so that only the
// weights' rounding costs accuracy and sums are exact.
#pragma once
#include <algorithm>

#include "arena.h"
#include "vectors.h"

namespace manta {

constexpr int kFewRows = 2;  // with more, tile registers are faster also for four-bit weights

class Activation {
 public:
  Activation(int width, bool integer)
      : integer(integer), width(width), num_steps(divide_up(width, integer ? 64 : 32)), keeps_floats_(integer) {
    if (!integer) return;
    shifted_.resize(kFewRows * 2 * shifted_bytes());
    memset(shifted_.data(), 128, shifted_.size());
  }

  // From now on, values() has the rows as they were before they are rounded.
  void keep_floats() { keeps_floats_ = true; }
  const float* values(int row) const {
    return reinterpret_cast<const float*>(staging_.data()) + static_cast<size_t>(row) * width;
  }

  void reserve(int num_rows) {
    const int blocks = divide_up(num_rows, kLane);
    tiles_.resize(static_cast<size_t>(blocks) * block_bytes());
    if (keeps_floats_) staging_.resize(static_cast<size_t>(blocks) * kLane * width * sizeof(float));
    if (integer) scales_.resize(static_cast<size_t>(blocks) * kLane * sizeof(float));
  }

  // Tiles of 16 rows: bfloat16, or the high digits followed by the low ones.
  const char* block(int index) const { return tiles_.data() + index * block_bytes(); }
  const char* low_digits(int index) const { return block(index) + num_steps * kTileBytes; }
  // A digit, 0 the high one, of one of the first kFewRows rows: each plus 128, inputs in order, digits of 0 at the end.
  uint8_t* shifted_digits(int row, int digit) const {
    return reinterpret_cast<uint8_t*>(shifted_.data()) + (row * 2 + digit) * shifted_bytes();
  }
  float scale(int row) const { return reinterpret_cast<const float*>(scales_.data())[row]; }

  // Sixteen values of a row from `column` (a multiple of 16).
  void store(int row, int column, __m512 values) {
    if (keeps_floats_) _mm512_storeu_ps(staging(row) + column, values);
    if (!integer) {
      char* at = tile_row(row, column / 32) + column % 32 * 2;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), to_bf16(values));
    }
  }

  // Rounds a stored row to its two digits; nothing to do in bfloat16.
  void seal(int row) {
    if (!integer) return;
    const float* source = staging(row);
    __m512 largest = _mm512_setzero_ps();
    for (int k = 0; k < width; k += kLane)
      largest = _mm512_max_ps(_mm512_abs_ps(_mm512_loadu_ps(source + k)), largest);
    const float top = _mm512_reduce_max_ps(largest);
    reinterpret_cast<float*>(scales_.data())[row] = top / kLargest;
    const __m512 inverse = _mm512_set1_ps(top > 0 ? kLargest / top : 0.0f);
    for (int k = 0; k < width; k += kLane) {
      const __m512i value = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(source + k), inverse));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(value, _mm512_set1_epi32(64)), 7);
      const __m512i low = _mm512_sub_epi32(value, _mm512_slli_epi32(high, 7));
      store_digit(row, 0, k, _mm512_cvtepi32_epi8(high));
      store_digit(row, 1, k, _mm512_cvtepi32_epi8(low));
    }
  }

  const bool integer;
  const int width;
  const int num_steps;

 private:
  static constexpr float kLargest = 127 * 128;

  size_t block_bytes() const { return static_cast<size_t>(num_steps) * kTileBytes * (integer ? 2 : 1); }
  size_t shifted_bytes() const { return static_cast<size_t>(num_steps) * 64; }
  void store_digit(int row, int digit, int column, __m128i values) {
    char* at = tile_row(row, column / 64) + digit * num_steps * kTileBytes + column % 64;
    _mm_store_si128(reinterpret_cast<__m128i*>(at), values);
    if (row >= kFewRows) return;
    const __m128i shifted = _mm_xor_si128(values, _mm_set1_epi8(-128));
    _mm_store_si128(reinterpret_cast<__m128i*>(shifted_digits(row, digit) + column), shifted);
  }
  char* tile_row(int row, int step) {
    return tiles_.data() + row / kLane * block_bytes() + step * kTileBytes + row % kLane * 64;
  }
  float* staging(int row) { return reinterpret_cast<float*>(staging_.data()) + static_cast<size_t>(row) * width; }

  bool keeps_floats_;
  Buffer tiles_, scales_, staging_, shifted_;
};

}  // namespace manta
