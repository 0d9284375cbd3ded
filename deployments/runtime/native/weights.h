// What a slice keeps for good: its matrices, norms, embedding and rotary angles, packed into one piece of memory.
#pragma once
#include <memory>
#include <stdexcept>
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

class Weights {
 public:
  explicit Weights(const SliceShape& shape)
      : shape_(shape), heads_{shape.num_query_heads, shape.num_kv_heads, shape.head_dim}, arena_(size(shape, heads_)) {
    const auto format = static_cast<Format>(shape.format);
    for (int index = 0; index < shape.num_layers; ++index) {
      layers_.push_back(Layer{
          Matrix(arena_, format, heads_.columns(), shape.hidden_size),
          Matrix(arena_, format, shape.hidden_size, heads_.query_columns()),
          Matrix(arena_, format, 2 * shape.intermediate_size, shape.hidden_size),
          Matrix(arena_, format, shape.hidden_size, shape.intermediate_size),
          take_vector(shape.hidden_size),
          take_vector(shape.hidden_size),
          take_vector(shape.head_dim),
          take_vector(shape.head_dim),
      });
    }
    angles_ = take_vector(shape.context_tokens * size_t(shape.head_dim));
    if (shape.has_head) {
      const auto head_format = static_cast<Format>(shape.head_format);
      head_ = std::make_unique<Matrix>(arena_, head_format, shape.vocab_size, shape.hidden_size);
      final_norm_ = take_vector(shape.hidden_size);
    }
    if (shape.has_embedding && !shape.shares_embedding)
      embedding_ = reinterpret_cast<uint16_t*>(arena_.take(size_t(shape.vocab_size) * shape.hidden_size * 2));
  }

  const Layer& layer(int index) const { return layers_[index]; }
  const Matrix& head() const { return *head_; }
  const float* final_norm() const { return final_norm_; }
  // The cosines and sines of a position.
  const float* angles(int position) const { return angles_ + size_t(position) * shape_.head_dim; }
  size_t bytes() const { return arena_.used(); }

  // A token's row of the embedding.
  void look_up(int token, float* out) const {
    if (shape_.shares_embedding) return unpack_row(*head_, token, out);
    const uint16_t* from = embedding_ + size_t(token) * shape_.hidden_size;
    for (int k = 0; k < shape_.hidden_size; k += kLane) _mm512_storeu_ps(out + k, from_bf16(from + k));
  }

  // Most bytes of unpacked weights that a member works on at a time.
  size_t scratch_bytes(int num_members) const {
    size_t most = 0;
    const Layer& any = layers_.front();
    for (const Matrix* matrix : {&any.query_key_value, &any.output, &any.gate_up, &any.down})
      most = std::max(most, matrix->panels_per_chunk(num_members) * matrix->unpacked_panel_bytes());
    return most;
  }

  // Loading: each tensor once, in any order.
  void load_matrix(int layer, Part part, const void* data, const float* scales, const float* minima, int num_rows,
                   int num_columns) {
    const auto [matrix, place] = find(layer, part);
    if (num_columns != matrix->width) throw std::invalid_argument("a matrix of another width than the configuration's");
    pack(*matrix, place, data, scales, minima, num_rows);
  }

  void load_bias(int layer, Part part, const float* data, int num_rows) {
    const auto [matrix, place] = find(layer, part);
    pack_bias(*matrix, place, data, num_rows);
  }

  void load_norm(int layer, NormPart part, const float* data, int width) {
    memcpy(find_norm(layer, part), data, width * sizeof(float));
  }

  void load_embedding(const uint16_t* data) {
    memcpy(embedding_, data, size_t(shape_.vocab_size) * shape_.hidden_size * 2);
  }

  void load_angles(const float* data) {
    memcpy(angles_, data, sizeof(float) * shape_.context_tokens * shape_.head_dim);
  }

  // The fused matrix that a tensor is part of, and where it stands there.
  std::pair<const Matrix*, Place> find(int layer, Part part) const {
    if (part == Part::kHead) return {head_.get(), {0, 1}};
    const Layer& at = layers_.at(layer);
    const int query_tiles = heads_.query_columns() / kLane, kv_tiles = heads_.kv_columns() / kLane;
    switch (part) {
      case Part::kQuery: return {&at.query_key_value, {0, 1}};
      case Part::kKey: return {&at.query_key_value, {query_tiles, 1}};
      case Part::kValue: return {&at.query_key_value, {query_tiles + kv_tiles, 1}};
      case Part::kOutput: return {&at.output, {0, 1}};
      case Part::kGate: return {&at.gate_up, {0, 2}};
      case Part::kUp: return {&at.gate_up, {1, 2}};
      default: return {&at.down, {0, 1}};
    }
  }

  void set_layer(int layer, int window, bool rotates) {
    layers_.at(layer).window = window;
    layers_.at(layer).rotates = rotates;
  }

 private:
  static size_t vector_bytes(size_t width) { return Arena::rounded(width * sizeof(float)); }

  static size_t size(const SliceShape& shape, Heads heads) {
    const auto format = static_cast<Format>(shape.format), head_format = static_cast<Format>(shape.head_format);
    const size_t layer = Matrix::all_bytes(format, heads.columns(), shape.hidden_size) +
                         Matrix::all_bytes(format, shape.hidden_size, heads.query_columns()) +
                         Matrix::all_bytes(format, 2 * shape.intermediate_size, shape.hidden_size) +
                         Matrix::all_bytes(format, shape.hidden_size, shape.intermediate_size) +
                         2 * vector_bytes(shape.hidden_size) + 2 * vector_bytes(shape.head_dim);
    size_t total = shape.num_layers * layer + vector_bytes(size_t(shape.context_tokens) * shape.head_dim);
    if (shape.has_head) total += Matrix::all_bytes(head_format, shape.vocab_size, shape.hidden_size);
    if (shape.has_head) total += vector_bytes(shape.hidden_size);
    if (shape.has_embedding && !shape.shares_embedding)
      total += Arena::rounded(size_t(shape.vocab_size) * shape.hidden_size * 2);
    return total;
  }

  float* take_vector(size_t width) { return reinterpret_cast<float*>(arena_.take(width * sizeof(float))); }

  float* find_norm(int layer, NormPart part) const {
    if (part == NormPart::kFinal) return final_norm_;
    const Layer& at = layers_.at(layer);
    switch (part) {
      case NormPart::kAttention: return at.attention_norm;
      case NormPart::kMlp: return at.mlp_norm;
      case NormPart::kQuery: return at.query_norm;
      default: return at.key_norm;
    }
  }

  const SliceShape shape_;
  const Heads heads_;
  Arena arena_;
  std::vector<Layer> layers_;
  std::unique_ptr<Matrix> head_;
  float* final_norm_ = nullptr;
  float* angles_ = nullptr;
  uint16_t* embedding_ = nullptr;
};

}  // namespace manta
