// A contiguous range of a decoder's layers, with what stands before the first and after the last: one call, one step.
//
// The architecture: RMSNorm, grouped-query attention with rotary embedding (optionally with norms over each head's
// query and key), SwiGLU, untied or tied output head. The residual stream, norms, rotations and softmax are float32;
// products take bfloat16 (or 15-bit integers, see matrix.h) and sum in float32 (or exactly).
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "attention.h"
#include "packing.h"

namespace manta {

// Mirrored by library.py, field by field.
struct SliceShape {
  int32_t format, head_format;
  int32_t num_layers, hidden_size, intermediate_size, vocab_size;
  int32_t num_query_heads, num_kv_heads, head_dim;
  int32_t has_embedding, has_head, shares_embedding;  // shares: the head's matrix is looked up as embedding too
  int32_t has_head_norms;                             // norms over each query and key head
  int32_t num_blocks, block_tokens, context_tokens;
  int32_t num_threads;
  float norm_epsilon, attention_scale;
};

// One step's sequences. Row r of sequence s has position positions[s] + r; all offsets are into the flat arrays.
struct StepArrays {
  int32_t num_sequences, num_rows, num_samples;
  const int32_t* first_rows;     // [num_sequences + 1]
  const int32_t* positions;      // [num_sequences]
  const int32_t* first_blocks;   // [num_sequences + 1]
  const int32_t* blocks;         // [first_blocks[num_sequences]]
  const int32_t* tokens;         // [num_rows], first slice only
  const int32_t* sampled_rows;   // [num_samples]
  const float* hidden_in;        // [num_rows, hidden_size], all but the first slice
  float* hidden_out;             // [num_rows, hidden_size], all but the last slice
  float* logits;                 // [num_samples, vocab_size], last slice
};

enum class Part : int { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kHead };
enum class NormPart : int { kAttention, kMlp, kQuery, kKey, kFinal };

struct Layer {
  Matrix query_key_value, output, gate_up, down;
  float* attention_norm;
  float* mlp_norm;
  float* query_norm;
  float* key_norm;
  int window = 0;      // 0: sees everything
  bool rotates = true;
};

class Slice {
 public:
  explicit Slice(const SliceShape& shape);

  // Loading: each tensor once, in any order. ValueError texts are thrown as std::invalid_argument.
  void load_matrix(int layer, Part part, const void* data, const float* scales, int num_rows, int num_columns);
  void load_bias(int layer, Part part, const float* data, int num_rows);
  void load_norm(int layer, NormPart part, const float* data, int width);
  void load_embedding(const uint16_t* data);
  void load_angles(const float* data);  // [context_tokens, head_dim]: cosines, then sines
  void set_layer(int layer, int window, bool rotates);

  void forward(const StepArrays& step);
  size_t weight_bytes() const { return weights_.used(); }

 private:
  struct Worker;
  struct AppendTask {
    int sequence, head, row, num_rows;
  };

  void check(const StepArrays& step) const;
  void plan(const StepArrays& step);
  void compute(Member& member);
  void compute_layer(Member& member, int index);
  void embed(Member& member);
  void norm_rows(Member& member, const float* weight, Activation& into, const int32_t* rows, int num_rows);
  void seal_rows(Member& member, Activation& activation);
  void attend(Member& member, int index);
  void append(int index, const AppendTask& task, Worker& worker);
  void prepare(const Layer& layer, const float* source, const float* norm, int position, float* out) const;
  void finish(Member& member);
  std::pair<const Matrix*, Place> find(int layer, Part part) const;

  const SliceShape shape_;
  const Heads heads_;
  Arena weights_;
  std::vector<Layer> layers_;
  std::unique_ptr<Matrix> head_;
  float* final_norm_ = nullptr;
  uint16_t* embedding_ = nullptr;
  Buffer angles_;
  Cache cache_;

  Activation normed_, attended_, activated_;
  Buffer hidden_, projected_;
  std::vector<std::unique_ptr<Worker>> workers_;
  StepArrays step_ = {};
  std::vector<AttentionTask> attention_tasks_;
  std::vector<AppendTask> append_tasks_;
  Team team_;  // last: its threads must be gone before the rest
};

}  // namespace manta
