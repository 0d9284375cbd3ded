// A contiguous range of a decoder's layers, with what stands before the first and after the last: one call, one step.
//
// The architecture: RMSNorm, grouped-query attention with rotary embedding (optionally with norms over each head's
// query and key), SwiGLU, untied or tied output head. The residual stream, norms, rotations and softmax are float32;
// products take bfloat16 (or 15-bit integers, see matrix.h) and sum in float32 (or exactly).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "adapters.h"
#include "weights.h"

namespace manta {

// One step's sequences. Row r of sequence s has position positions[s] + r; all offsets are into the flat arrays.
struct StepArrays {
  int32_t num_sequences, num_rows, num_samples;
  const int32_t* first_rows;     // [num_sequences + 1]
  const int32_t* positions;      // [num_sequences]
  const int32_t* first_blocks;   // [num_sequences + 1]
  const int32_t* blocks;         // [first_blocks[num_sequences]]
  const int32_t* tokens;         // [num_rows], first slice only
  const int32_t* sampled_rows;   // [num_samples]
  const int32_t* adapters;       // [num_sequences], -1 for none; null when the slice has none
  const float* hidden_in;        // [num_rows, hidden_size], all but the first slice
  float* hidden_out;             // [num_rows, hidden_size], all but the last slice
  float* logits;                 // [num_samples, vocab_size], last slice
};

class Slice {
 public:
  explicit Slice(const SliceShape& shape);

  Weights weights;

  // Loading, before the first step: how many adapters steps may name, then each one's thin matrices for a tensor.
  void set_num_adapters(int num_adapters);
  void load_adapter(int adapter, int layer, Part part, const float* down, const float* up, float scale, int rank,
                    int num_rows, int num_columns);

  // One step; throws std::invalid_argument before anything is read or written where an index is wrong.
  void forward(const StepArrays& step);

 private:
  struct Worker;
  struct AppendTask {
    int sequence, head, row, num_rows;
  };

  void check(const StepArrays& step) const;
  void check_sequence(const StepArrays& step, int sequence) const;
  void plan(const StepArrays& step);
  void plan_adapters(const StepArrays& step);
  void compute(Member& member);
  void compute_layer(Member& member, int index);
  void embed(Member& member);
  void norm_rows(Member& member, const float* weight, Activation& into, const int32_t* rows, int num_rows);
  void seal_rows(Member& member, Activation& activation);
  void attend(Member& member, int index);
  void append(int index, const AppendTask& task, Worker& worker);
  void attend_task(int index, const AttentionTask& task, Worker& worker);
  void prepare(const Layer& layer, const float* source, const float* norm, int position, float* out) const;
  void finish(Member& member);
  template <class Emit>
  void multiply_adapted(Member& member, const Additions* additions, const Matrix& matrix, const Activation& input,
                        const Emit& emit);

  float* hidden(size_t row) const { return reinterpret_cast<float*>(hidden_.data()) + row * shape_.hidden_size; }
  float* thin(size_t row) const { return reinterpret_cast<float*>(thin_.data()) + row * thin_width_; }
  float* projected(size_t row) const { return reinterpret_cast<float*>(projected_.data()) + row * heads_.columns(); }

  const SliceShape shape_;
  const Heads heads_;
  Cache cache_;
  Activation normed_, attended_, activated_;
  Buffer hidden_, projected_;  // float32 rows: the residual stream; queries, keys and values
  std::vector<std::unique_ptr<Worker>> workers_;
  StepArrays step_ = {};
  std::vector<AttentionTask> attention_tasks_;
  std::vector<AppendTask> append_tasks_;
  int num_adapters_ = 0;
  std::vector<LayerAdditions> additions_;  // of each layer; empty without adapters
  std::vector<ProjectTask> project_tasks_;
  std::vector<int> row_adapters_;  // of every row of the step, -1 for none
  Buffer thin_;                    // float32 rows: what an adapter's first matrix makes of a row
  size_t thin_width_ = 0;
  Team team_;  // last: its threads must be gone before the rest
};

}  // namespace manta
