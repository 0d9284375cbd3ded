// Sixteen floats at a time: rounding to bfloat16, exponentials, and the tile registers' configuration.
#pragma once
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

namespace manta {

constexpr int kTileBytes = 1024;  // 16 rows of 64 bytes
constexpr int kLane = 16;         // floats in a vector; rows and columns of a result tile

inline int divide_up(int value, int by) { return (value + by - 1) / by; }
inline int round_up(int value, int to) { return divide_up(value, to) * to; }

inline __m512 from_bf16(const uint16_t* source) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

inline __m256i to_bf16(__m512 value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }

// 2^x with a relative error of 3e-6, far less than what the result is rounded to (bfloat16, or 15 bits where weights are
// quantized); 0 far below -126, also for minus infinity; NaN for NaN. The polynomial is the minimax one over [0, 1).
inline __m512 exp2_of(__m512 x) {
  const __m512 part = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x minus its floor
  __m512 sum = _mm512_set1_ps(1.342668427e-02f);
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(5.224247422e-02f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(2.412802048e-01f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(6.930448449e-01f));
  sum = _mm512_fmadd_ps(sum, part, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(sum, x);  // by 2^floor(x)
}

// 1 / x with a relative error of about 1e-7: one step of Newton's from the processor's estimate.
inline __m512 reciprocal_of(__m512 x) {
  const __m512 estimate = _mm512_rcp14_ps(x);
  return _mm512_mul_ps(estimate, _mm512_fnmadd_ps(x, estimate, _mm512_set1_ps(2.0f)));
}

// x / (1 + e^-x)
inline __m512 silu_of(__m512 x) {
  const __m512 exponent = _mm512_mul_ps(x, _mm512_set1_ps(-1.4426950408889634f));
  const __m512 power = exp2_of(_mm512_min_ps(exponent, _mm512_set1_ps(127.0f)));
  return _mm512_mul_ps(x, reciprocal_of(_mm512_add_ps(power, _mm512_set1_ps(1.0f))));
}

// The compiler does not know that tile loads read memory; earlier stores must not move behind them.
inline void finish_stores() { asm volatile("" ::: "memory"); }

// Within its life, results too small for a normal float32 are zero: the processor takes long over the others.
class FlushTinyNumbers {
 public:
  FlushTinyNumbers() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushTinyNumbers() { _mm_setcsr(before_); }

 private:
  const unsigned before_;
};

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// The compiler's intrinsic names only the first bytes of the configuration as its input; all must be in memory.
inline void load_configuration(const TileConfig& config) {
  asm volatile("" ::"r"(&config) : "memory");
  _tile_loadconfig(&config);
}

}  // namespace manta
