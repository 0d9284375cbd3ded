// Low-rank adapters beside a slice's matrices: what each adds to the products of its own rows, in float32.
//
// For a matrix W [N, K] an adapter has two thin ones, A [rank, K] and B [N, rank]; its rows get scale * B (A x) more. A
// row's addition depends on that row and its adapter alone.
#pragma once
#include <stdexcept>
#include <vector>

#include "packing.h"
#include "weights.h"

namespace manta {

// One adapter's part in one tensor of a fused matrix.
struct LowRank {
  Place place;              // of the tensor's tile columns in the fused matrix
  int rank, num_columns;    // N
  std::vector<float> down;  // [rank, K]
  std::vector<float> up;    // [rank, N rounded up to a lane], times the scale
};

inline float dot(const float* left, const float* right, int width) {
  __m512 sum = _mm512_setzero_ps();
  for (int k = 0; k < width; k += kLane)
    sum = _mm512_fmadd_ps(_mm512_loadu_ps(left + k), _mm512_loadu_ps(right + k), sum);
  return _mm512_reduce_add_ps(sum);
}

// What all adapters add to one fused matrix; entry i of `parts` is adapter i's.
class Additions {
 public:
  void load(int adapter, Place place, const float* down, const float* up, float scale, int rank, int num_columns,
            int width) {
    if (static_cast<int>(parts_.size()) <= adapter) parts_.resize(adapter + 1);
    const int padded = round_up(num_columns, kLane);
    LowRank part{place, rank, num_columns, {down, down + size_t(rank) * width}, std::vector<float>(size_t(rank) * padded)};
    for (int column = 0; column < num_columns; ++column)
      for (int j = 0; j < rank; ++j) part.up[size_t(j) * padded + column] = scale * up[size_t(column) * rank + j];
    parts_[adapter].push_back(std::move(part));
  }

  bool empty() const { return parts_.empty(); }

  // The addition to one row, in the order of the fused matrix's columns; `out` has room for whole panels.
  void compute(int adapter, const float* input, int width, float* out, int num_columns) const {
    memset(out, 0, round_up(num_columns, kPanelColumns) * sizeof(float));
    if (adapter >= static_cast<int>(parts_.size())) return;
    for (const LowRank& part : parts_[adapter]) add(part, input, width, out);
  }

 private:
  static void add(const LowRank& part, const float* input, int width, float* out) {
    const int padded = round_up(part.num_columns, kLane);
    for (int j = 0; j < part.rank; ++j) {
      const __m512 factor = _mm512_set1_ps(dot(part.down.data() + size_t(j) * width, input, width));
      const float* up = part.up.data() + size_t(j) * padded;
      for (int n = 0; n < padded; n += kLane) {
        float* at = out + (part.place.first + n / kLane * part.place.stride) * kLane;
        _mm512_storeu_ps(at, _mm512_fmadd_ps(factor, _mm512_loadu_ps(up + n), _mm512_loadu_ps(at)));
      }
    }
  }

  std::vector<std::vector<LowRank>> parts_;
};

// The additions to every fused matrix of one layer.
struct LayerAdditions {
  Additions query_key_value, output, gate_up, down;
};

}  // namespace manta
