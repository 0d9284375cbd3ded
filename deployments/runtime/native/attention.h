// The paged KV cache, and attention that reads it in place.
//
// A unit is 16 tokens of one KV head in one layer, stored as the tile registers load it: keys as tiles of 32 head
// dimensions ([dimension pair][token][2]), values as half tiles of 16 dimensions ([token pair][dimension][2]), all in
// bfloat16. A block of the block table is block_tokens / 16 units.
//
// Queries that share a KV head are folded into rows (position major), 16 rows to a task. A task walks over its context
// in segments of 512 tokens that begin at multiples of 512, so that a row's result depends on neither its company in
// the task nor how its prompt was cut. Online softmax: Milakov & Gimelshein 2018.
#pragma once
#include <math.h>

#include <algorithm>

#include "product.h"

namespace manta {

constexpr int kUnitTokens = 16;
constexpr int kSegmentUnits = 32;
constexpr int kScoredUnits = 4;  // at a time, a result tile each
constexpr float kUnseen = -1e30f;  // score of what may not be seen
constexpr float kLowest = -1e29f;  // best score before any; far above kUnseen, whose weight is therefore zero

struct Heads {
  int num_query, num_kv, dim;
  int group() const { return num_query / num_kv; }
  int query_columns() const { return num_query * dim; }
  int kv_columns() const { return num_kv * dim; }
  int columns() const { return query_columns() + 2 * kv_columns(); }
};

// --- cache -----------------------------------------------------------------------------------------------------

class Cache {
 public:
  Cache(Heads heads, int num_layers, int num_blocks, int block_tokens)
      : num_blocks(num_blocks),
        block_tokens(block_tokens),
        num_key_tiles(divide_up(heads.dim, 32)),
        num_value_tiles(divide_up(heads.dim, kLane)),
        unit_bytes(num_key_tiles * size_t{kTileBytes} + num_value_tiles * size_t{kTileBytes / 2}),
        head_bytes_(block_tokens / kUnitTokens * unit_bytes),
        block_bytes_(heads.num_kv * head_bytes_),
        memory_(num_layers * (num_blocks * block_bytes_)) {}

  // The unit that holds `position` of a sequence with this block table.
  char* unit(int layer, const int32_t* blocks, int head, int position) const {
    const size_t block = static_cast<size_t>(layer) * num_blocks + blocks[position / block_tokens];
    const size_t unit = position % block_tokens / kUnitTokens;
    return memory_.data() + block * block_bytes_ + head * head_bytes_ + unit * unit_bytes;
  }
  const char* values(const char* unit) const { return unit + num_key_tiles * kTileBytes; }

  // Stores one token's key and value, [dim] each; the first token of a unit clears the values of the others, whose
  // probability is zero but which may be infinite.
  void write(char* unit, int token, const float* key, const float* value, int dim) const {
    const __m512i pair_rows = _mm512_slli_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), 6);
    for (int d = 0; d < dim; d += kLane) {
      const __m256i pairs = to_bf16(_mm512_loadu_ps(key + d));
      char* to = unit + d / 32 * kTileBytes + d % 32 * 32 + token * 4;
      _mm256_i32scatter_epi32(to, _mm512_castsi512_si256(pair_rows), pairs, 1);
    }
    char* values_at = unit + num_key_tiles * kTileBytes;
    if (token == 0) memset(values_at, 0, num_value_tiles * size_t{kTileBytes / 2});
    for (int d = 0; d < dim; d += kLane) {
      const __m512i wide = _mm512_cvtepu16_epi32(to_bf16(_mm512_loadu_ps(value + d)));
      char* to = values_at + d / kLane * (kTileBytes / 2) + token / 2 * 64;
      if (token % 2 == 0) {
        _mm512_mask_storeu_epi16(to, 0x55555555u, wide);
      } else {
        _mm512_mask_storeu_epi16(to, 0xAAAAAAAAu, _mm512_slli_epi32(wide, 16));
      }
    }
  }

  const int num_blocks, block_tokens;
  const int num_key_tiles, num_value_tiles;
  const size_t unit_bytes;

 private:
  const size_t head_bytes_, block_bytes_;
  Buffer memory_;
};

// --- one head's vector before it is used -----------------------------------------------------------------------

inline __mmask16 first_lanes(int count) {
  return static_cast<__mmask16>(count >= kLane ? 0xFFFF : count <= 0 ? 0 : (1 << count) - 1);
}

// x / sqrt(mean(x^2) + epsilon) * weight, in float32.
inline void normalize(const float* x, const float* weight, int width, float epsilon, float* out) {
  __m512 sum = _mm512_setzero_ps();
  for (int k = 0; k < width; k += kLane) {
    const __m512 value = _mm512_loadu_ps(x + k);
    sum = _mm512_fmadd_ps(value, value, sum);
  }
  const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(sum) / static_cast<float>(width) + epsilon));
  for (int k = 0; k < width; k += kLane) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(x + k), factor);
    _mm512_storeu_ps(out + k, _mm512_mul_ps(scaled, _mm512_loadu_ps(weight + k)));
  }
}

// Rotates the pairs (d, d + dim / 2) of x in place by the angles of one position: dim / 2 cosines, then sines.
inline void rotate(float* x, const float* angles, int dim) {
  const int half = dim / 2;
  for (int d = 0; d < half; d += kLane) {
    const __mmask16 lanes = first_lanes(half - d);
    const __m512 cosine = _mm512_maskz_loadu_ps(lanes, angles + d);
    const __m512 sine = _mm512_maskz_loadu_ps(lanes, angles + half + d);
    const __m512 low = _mm512_maskz_loadu_ps(lanes, x + d), high = _mm512_maskz_loadu_ps(lanes, x + half + d);
    _mm512_mask_storeu_ps(x + d, lanes, _mm512_fmsub_ps(low, cosine, _mm512_mul_ps(high, sine)));
    _mm512_mask_storeu_ps(x + half + d, lanes, _mm512_fmadd_ps(high, cosine, _mm512_mul_ps(low, sine)));
  }
}

// --- attention of up to sixteen folded rows --------------------------------------------------------------------

// What one task looks at: rows `first .. first + num_rows` of a sequence's folded rows.
struct AttentionTask {
  const int32_t* blocks;
  int position;   // of the sequence's first new row
  int first_row;  // of the sequence in the step
  int head;       // KV head
  int first, num_rows;
};

class Attention {
 public:
  explicit Attention(Heads heads)
      : heads_(heads),
        scores_(kSegmentUnits * kTileBytes),
        weights_(kSegmentUnits * kTileBytes / 2),
        part_(kLane * heads.dim * sizeof(float)),
        sum_(kLane * heads.dim * sizeof(float)),
        queries_(divide_up(heads.dim, 32) * kTileBytes) {}

  // Row `row` of the task: its query, [dim].
  void set_query(int row, const float* query) {
    for (int d = 0; d < heads_.dim; d += kLane) {
      char* to = queries_.data() + d / 32 * kTileBytes + row * 64 + d % 32 * 2;
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16(_mm512_loadu_ps(query + d)));
    }
  }

  // Attends with the queries that were set; `window` is how many positions back a row sees, itself included, 0 for all.
  void run(const Cache& cache, int layer, const AttentionTask& task, int window, float scale) {
    configure(task.num_rows);
    const int first_position = task.position + task.first / heads_.group();
    const int last_position = task.position + (task.first + task.num_rows - 1) / heads_.group();
    const int first_unit = window > 0 ? std::max(0, first_position - window + 1) / kUnitTokens : 0;
    const int num_units = last_position / kUnitTokens + 1;
    for (int row = 0; row < task.num_rows; ++row) {
      best_[row] = kLowest;
      total_[row] = 0.0f;
    }
    memset(sum_.data(), 0, task.num_rows * heads_.dim * sizeof(float));
    const float binary_scale = scale * 1.4426950408889634f;  // of exponents to the base 2
    for (int start = first_unit / kSegmentUnits * kSegmentUnits; start < num_units; start += kSegmentUnits) {
      const int from = std::max(start, first_unit), to = std::min(start + kSegmentUnits, num_units);
      for (int unit = from; unit < to; ++unit)
        units_[unit - from] = cache.unit(layer, task.blocks, task.head, unit * kUnitTokens);
      score(cache, task, {from, to, first_position, last_position, window});
      raise_best(task.num_rows, binary_scale);
      sum_values(cache, task.num_rows, to - from, binary_scale);
    }
  }

  // Sixteen values of a row's result from dimension `d`.
  __m512 result(int row, int d) const {
    const float* sums = reinterpret_cast<const float*>(sum_.data()) + row * heads_.dim;
    return _mm512_div_ps(_mm512_loadu_ps(sums + d), _mm512_set1_ps(total_[row]));
  }

  // The registers are set up for other shapes now.
  void forget_configuration() { configured_rows_ = 0; }

 private:
  // 0-3 results, 4 queries, 5 weights (16 tokens), 6 keys, 7 values (8 token pairs)
  void configure(int num_rows) {
    if (num_rows == configured_rows_) return;
    configured_rows_ = num_rows;
    TileConfig config;
    for (int tile = 0; tile < 8; ++tile) {
      config.rows[tile] = static_cast<uint8_t>(tile < 6 ? num_rows : tile == 6 ? kLane : kUnitTokens / 2);
      config.row_bytes[tile] = tile == 5 ? 32 : 64;
    }
    load_configuration(config);
  }

  float* score_row(int unit, int row) {
    return reinterpret_cast<float*>(scores_.data()) + (unit * kLane + row) * kLane;
  }

  // A segment's units, and where the task's rows are.
  struct View {
    int from, to;  // units
    int first_position, last_position, window;
  };

  // Scores of the whole segment. The vector units look for the highest among a few units' scores while the tile
  // registers multiply the next ones.
  void score(const Cache& cache, const AttentionTask& task, const View& view) {
    const int num_units = view.to - view.from;
    for (int row = 0; row < task.num_rows; ++row) highest_[row] = _mm512_set1_ps(kUnseen);
    finish_stores();
    for (int unit = 0; unit < num_units; unit += kScoredUnits) {
      multiply_keys(cache, unit, std::min(kScoredUnits, num_units - unit));
      if (task.first == 0) prefetch(cache, unit, num_units);
      if (unit > 0) find_highest(task, view, unit - kScoredUnits, unit);
    }
    find_highest(task, view, (num_units - 1) / kScoredUnits * kScoredUnits, num_units);
  }

  void multiply_keys(const Cache& cache, int unit, int count) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int tile = 0; tile < cache.num_key_tiles; ++tile) {
      const size_t at = static_cast<size_t>(tile) * kTileBytes;
      _tile_loadd(4, queries_.data() + at, 64);
      _tile_loadd(6, units_[unit] + at, 64);
      _tile_dpbf16ps(0, 4, 6);
      if (count > 1) {
        _tile_loadd(6, units_[unit + 1] + at, 64);
        _tile_dpbf16ps(1, 4, 6);
      }
      if (count > 2) {
        _tile_loadd(6, units_[unit + 2] + at, 64);
        _tile_dpbf16ps(2, 4, 6);
      }
      if (count > 3) {
        _tile_loadd(6, units_[unit + 3] + at, 64);
        _tile_dpbf16ps(3, 4, 6);
      }
    }
    char* out = scores_.data() + unit * kTileBytes;
    _tile_stored(0, out, 64);
    if (count > 1) _tile_stored(1, out + kTileBytes, 64);
    if (count > 2) _tile_stored(2, out + 2 * kTileBytes, 64);
    if (count > 3) _tile_stored(3, out + 3 * kTileBytes, 64);
  }

  // Brings the values of the units just scored near, and keys further on.
  void prefetch(const Cache& cache, int unit, int num_units) {
    for (int near = unit; near < std::min(unit + kScoredUnits, num_units); ++near) {
      prefetch_lines(cache.values(units_[near]), cache.num_value_tiles * (kTileBytes / 2));
      const int far = near + 2 * kScoredUnits;
      if (far < num_units) prefetch_lines(units_[far], cache.num_key_tiles * kTileBytes);
    }
  }

  // Each lane's highest score so far, after what a row may not see was hidden.
  void find_highest(const AttentionTask& task, const View& view, int from, int to) {
    for (int unit = from; unit < to; ++unit) hide(task, view, unit);
    for (int row = 0; row < task.num_rows; ++row) {
      __m512 highest = highest_[row];
      for (int unit = from; unit < to; ++unit) highest = _mm512_max_ps(_mm512_loadu_ps(score_row(unit, row)), highest);
      highest_[row] = highest;
    }
  }

  // Gives kUnseen to what a row may not see; a unit that every row sees whole is left alone.
  void hide(const AttentionTask& task, const View& view, int unit) {
    const int start = (view.from + unit) * kUnitTokens, stop = start + kUnitTokens;
    const bool past = stop <= view.first_position + 1;
    const bool inside = view.window == 0 || start > view.last_position - view.window;
    if (past && inside) return;
    for (int row = 0; row < task.num_rows; ++row) {
      const int position = task.position + (task.first + row) / heads_.group();
      __mmask16 seen = first_lanes(position + 1 - start);
      if (view.window > 0) seen &= static_cast<__mmask16>(~first_lanes(position - view.window + 1 - start));
      float* scores = score_row(unit, row);
      _mm512_storeu_ps(scores, _mm512_mask_loadu_ps(_mm512_set1_ps(kUnseen), seen, scores));
    }
  }

  // From here on weights are relative to the best score so far; what was summed before shrinks to match.
  void raise_best(int num_rows, float scale) {
    for (int row = 0; row < num_rows; ++row) {
      const float best = std::max(best_[row], _mm512_reduce_max_ps(highest_[row]));
      shrink_[row] = _mm512_cvtss_f32(exp2_of(_mm512_set1_ps((best_[row] - best) * scale)));
      best_[row] = best;
    }
  }

  // A unit's scores -> weights in bfloat16.
  void weigh(int unit, int num_rows, float scale) {
    const __m512 factor = _mm512_set1_ps(scale);
    for (int row = 0; row < num_rows; ++row) {
      const __m512 shift = _mm512_set1_ps(best_[row] * scale);
      const __m512 weight = exp2_of(_mm512_fmsub_ps(_mm512_loadu_ps(score_row(unit, row)), factor, shift));
      totals_[row] = _mm512_add_ps(totals_[row], weight);
      char* to = weights_.data() + (unit * kLane + row) * 32;
      _mm256_store_si256(reinterpret_cast<__m256i*>(to), to_bf16(weight));
    }
    finish_stores();
  }

  // The segment's values times their weights, which are made while the tile registers multiply those before.
  void sum_values(const Cache& cache, int num_rows, int num_units, float scale) {
    for (int row = 0; row < num_rows; ++row) totals_[row] = _mm512_setzero_ps();
    weigh(0, num_rows, scale);
    multiply_values(cache, 0, num_units, [&](int unit) {
      if (unit + 1 < num_units) weigh(unit + 1, num_rows, scale);
    });
    for (int tile = 4; tile < cache.num_value_tiles; tile += 4) multiply_values(cache, tile, num_units, [](int) {});
    for (int row = 0; row < num_rows; ++row) {
      total_[row] = total_[row] * shrink_[row] + _mm512_reduce_add_ps(totals_[row]);
      add_part(row);
    }
  }

  // Four value tiles from `tile` on.
  template <class Before>
  void multiply_values(const Cache& cache, int tile, int num_units, const Before& before) {
    const int count = std::min(4, cache.num_value_tiles - tile);
    const size_t row_bytes = heads_.dim * sizeof(float);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int unit = 0; unit < num_units; ++unit) {
      before(unit);
      const char* values = cache.values(units_[unit]) + tile * (kTileBytes / 2);
      _tile_loadd(5, weights_.data() + unit * (kTileBytes / 2), 32);
      _tile_loadd(7, values, 64);
      _tile_dpbf16ps(0, 5, 7);
      if (count > 1) {
        _tile_loadd(7, values + kTileBytes / 2, 64);
        _tile_dpbf16ps(1, 5, 7);
      }
      if (count > 2) {
        _tile_loadd(7, values + 2 * (kTileBytes / 2), 64);
        _tile_dpbf16ps(2, 5, 7);
      }
      if (count > 3) {
        _tile_loadd(7, values + 3 * (kTileBytes / 2), 64);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    char* out = part_.data() + tile * 64;
    _tile_stored(0, out, row_bytes);
    if (count > 1) _tile_stored(1, out + 64, row_bytes);
    if (count > 2) _tile_stored(2, out + 128, row_bytes);
    if (count > 3) _tile_stored(3, out + 192, row_bytes);
  }

  void add_part(int row) {
    float* sums = reinterpret_cast<float*>(sum_.data()) + row * heads_.dim;
    const float* parts = reinterpret_cast<const float*>(part_.data()) + row * heads_.dim;
    const __m512 shrink = _mm512_set1_ps(shrink_[row]);
    for (int d = 0; d < heads_.dim; d += kLane)
      _mm512_storeu_ps(sums + d, _mm512_fmadd_ps(_mm512_loadu_ps(sums + d), shrink, _mm512_loadu_ps(parts + d)));
  }

  const Heads heads_;
  Buffer scores_, weights_, part_, sum_, queries_;
  const char* units_[kSegmentUnits] = {};
  float best_[kLane] = {}, total_[kLane] = {}, shrink_[kLane] = {};
  __m512 highest_[kLane], totals_[kLane];  // of a segment, lane by lane
  int configured_rows_ = 0;
};

}  // namespace manta
