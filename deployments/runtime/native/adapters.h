// Low-rank adapters beside a slice's matrices: what each adds to the products of its own rows, in float32.
//
// For a matrix W [N, K] an adapter has two thin ones, A [rank, K] and B [N, rank]; its rows get scale * B (A x) more. A
// row's addition depends on that row and its adapter alone. A x comes in a phase of its own; B is applied where a
// panel of the product is finished, while 32 of its columns stay in the first-level cache.
#pragma once
#include <algorithm>
#include <vector>

#include "packing.h"
#include "weights.h"

namespace manta {

constexpr int kProjectRows = 4;

// Up to kProjectRows neighbouring rows of a step with the same adapter, projected together.
struct ProjectTask {
  int row, num_rows, adapter;
};

// What all adapters add to one fused matrix.
class Additions {
 public:
  void load(int adapter, Place place, const float* down, const float* up, float scale, int rank, int num_columns,
            const Matrix& matrix) {
    if (static_cast<int>(adapters_.size()) <= adapter) adapters_.resize(adapter + 1);
    Adapter& at = adapters_[adapter];
    at.tiles.resize(2 * matrix.num_panels);
    for (int column = 0; column < num_columns; ++column) {
      Tile& tile = at.tiles[place.first + column / kLane * place.stride];
      tile.first = at.num_projected;
      tile.rank = rank;
      tile.up.resize(size_t(rank) * kLane);
      for (int j = 0; j < rank; ++j) tile.up[j * kLane + column % kLane] = scale * up[size_t(column) * rank + j];
    }
    at.down.insert(at.down.end(), down, down + size_t(rank) * matrix.width);
    at.num_projected += rank;
  }

  bool empty() const { return adapters_.empty(); }
  int num_projected(int adapter) const { return has(adapter) ? adapters_[adapter].num_projected : 0; }

  // A x of a task's rows, of all tensors of the fused matrix; `input` and `out` are the first row's.
  void project(const ProjectTask& task, const float* input, int width, float* out, size_t out_width) const {
    for (int j = 0; j < num_projected(task.adapter); ++j) {
      const float* down = adapters_[task.adapter].down.data() + size_t(j) * width;
      if (task.num_rows == kProjectRows) {
        project_rows<kProjectRows>(down, input, width, out + j, out_width);
      } else {
        for (int row = 0; row < task.num_rows; ++row)
          project_rows<1>(down, input + size_t(row) * width, width, out + row * out_width + j, out_width);
      }
    }
  }

  // Adds B (A x) to a panel of one row.
  void add(int adapter, int panel, const float* projected, __m512& left, __m512& right) const {
    if (!has(adapter)) return;
    const Tile* tiles = adapters_[adapter].tiles.data() + 2 * panel;
    left = add_tile(tiles[0], projected, left);
    right = add_tile(tiles[1], projected, right);
  }

 private:
  // Sixteen columns: B's rows for them, by rank, times the scale; `first` is where their tensor's A x begins.
  struct Tile {
    int first = 0, rank = 0;
    std::vector<float> up;
  };
  struct Adapter {
    int num_projected = 0;
    std::vector<float> down;  // [num_projected, K]
    std::vector<Tile> tiles;
  };

  bool has(int adapter) const { return adapter < static_cast<int>(adapters_.size()); }

  static __m512 add_tile(const Tile& tile, const float* projected, __m512 sum) {
    const float* up = tile.up.data();
    for (int j = 0; j < tile.rank; ++j)
      sum = _mm512_fmadd_ps(_mm512_set1_ps(projected[tile.first + j]), _mm512_loadu_ps(up + j * kLane), sum);
    return sum;
  }

  // Each row's sum has the same order, however many rows there are.
  template <int kRows>
  static void project_rows(const float* down, const float* input, int width, float* out, size_t out_width) {
    __m512 sums[kRows];
    for (int row = 0; row < kRows; ++row) sums[row] = _mm512_setzero_ps();
    for (int k = 0; k < width; k += kLane) {
      const __m512 values = _mm512_loadu_ps(down + k);
      for (int row = 0; row < kRows; ++row)
        sums[row] = _mm512_fmadd_ps(values, _mm512_loadu_ps(input + size_t(row) * width + k), sums[row]);
    }
    for (int row = 0; row < kRows; ++row) out[row * out_width] = _mm512_reduce_add_ps(sums[row]);
  }

  std::vector<Adapter> adapters_;
};

// The additions to every fused matrix of one layer.
struct LayerAdditions {
  Additions query_key_value, output, gate_up, down;
};

}  // namespace manta
