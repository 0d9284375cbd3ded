#include "slice.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace manta {

namespace {

constexpr int kRowsPerChunk = 4;
constexpr int kAppendRows = 64;
constexpr int kPhasesPerLayer = 10;

size_t vector_bytes(int width) { return Arena::rounded(width * sizeof(float)); }

size_t weight_size(const SliceShape& shape) {
  const auto format = static_cast<Format>(shape.format);
  const Heads heads{shape.num_query_heads, shape.num_kv_heads, shape.head_dim};
  size_t layer = Matrix::all_bytes(format, heads.columns(), shape.hidden_size) +
                 Matrix::all_bytes(format, shape.hidden_size, heads.query_columns()) +
                 Matrix::all_bytes(format, 2 * shape.intermediate_size, shape.hidden_size) +
                 Matrix::all_bytes(format, shape.hidden_size, shape.intermediate_size) +
                 2 * vector_bytes(shape.hidden_size) + 2 * vector_bytes(shape.head_dim);
  size_t total = shape.num_layers * layer;
  if (shape.has_head) {
    total += Matrix::all_bytes(static_cast<Format>(shape.head_format), shape.vocab_size, shape.hidden_size);
    total += vector_bytes(shape.hidden_size);
  }
  if (shape.has_embedding && !shape.shares_embedding)
    total += Arena::rounded(static_cast<size_t>(shape.vocab_size) * shape.hidden_size * 2);
  return total;
}

float* take_vector(Arena& arena, int width) { return reinterpret_cast<float*>(arena.take(width * sizeof(float))); }

}  // namespace

// What a member keeps for itself.
struct Slice::Worker {
  Worker(Heads heads, size_t scratch_bytes) : attention(heads), scratch(scratch_bytes), vector(4 * 65536) {}
  Attention attention;
  Buffer scratch;  // unpacked panels
  Buffer vector;   // one row
  float* row() const { return reinterpret_cast<float*>(vector.data()); }
};

Slice::Slice(const SliceShape& shape)
    : shape_(shape),
      heads_{shape.num_query_heads, shape.num_kv_heads, shape.head_dim},
      weights_(weight_size(shape)),
      angles_(sizeof(float) * shape.context_tokens * shape.head_dim),
      cache_(heads_, shape.num_layers, shape.num_blocks, shape.block_tokens),
      normed_(shape.hidden_size, is_integer(static_cast<Format>(shape.format))),
      attended_(heads_.query_columns(), is_integer(static_cast<Format>(shape.format))),
      activated_(shape.intermediate_size, is_integer(static_cast<Format>(shape.format))),
      team_(shape.num_threads, shape.num_layers * kPhasesPerLayer + 8) {
  const auto format = static_cast<Format>(shape.format);
  for (int index = 0; index < shape.num_layers; ++index) {
    layers_.push_back(Layer{
        Matrix(weights_, format, heads_.columns(), shape.hidden_size),
        Matrix(weights_, format, shape.hidden_size, heads_.query_columns()),
        Matrix(weights_, format, 2 * shape.intermediate_size, shape.hidden_size),
        Matrix(weights_, format, shape.hidden_size, shape.intermediate_size),
        take_vector(weights_, shape.hidden_size),
        take_vector(weights_, shape.hidden_size),
        take_vector(weights_, shape.head_dim),
        take_vector(weights_, shape.head_dim),
    });
  }
  if (shape.has_head) {
    head_ = std::make_unique<Matrix>(weights_, static_cast<Format>(shape.head_format), shape.vocab_size,
                                     shape.hidden_size);
    final_norm_ = take_vector(weights_, shape.hidden_size);
  }
  if (shape.has_embedding && !shape.shares_embedding) {
    const size_t bytes = static_cast<size_t>(shape.vocab_size) * shape.hidden_size * 2;
    embedding_ = reinterpret_cast<uint16_t*>(weights_.take(bytes));
  }
  const int widest = std::max({shape.hidden_size, shape.intermediate_size, heads_.query_columns()});
  const size_t scratch = static_cast<size_t>(divide_up(widest, 64)) * 2 * kTileBytes * kChunkPanels;
  for (int index = 0; index < shape.num_threads; ++index)
    workers_.push_back(std::make_unique<Worker>(heads_, scratch));
}

// --- loading ---------------------------------------------------------------------------------------------------

std::pair<const Matrix*, Place> Slice::find(int layer, Part part) const {
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

void Slice::load_matrix(int layer, Part part, const void* data, const float* scales, int num_rows, int num_columns) {
  const auto [matrix, place] = find(layer, part);
  if (num_columns != matrix->width) throw std::invalid_argument("a matrix of another width than the configuration's");
  pack(*matrix, place, data, scales, num_rows);
}

void Slice::load_bias(int layer, Part part, const float* data, int num_rows) {
  const auto [matrix, place] = find(layer, part);
  pack_bias(*matrix, place, data, num_rows);
}

void Slice::load_norm(int layer, NormPart part, const float* data, int width) {
  float* to = final_norm_;
  if (part != NormPart::kFinal) {
    const Layer& at = layers_.at(layer);
    to = part == NormPart::kAttention ? at.attention_norm
         : part == NormPart::kMlp     ? at.mlp_norm
         : part == NormPart::kQuery   ? at.query_norm
                                      : at.key_norm;
  }
  memcpy(to, data, width * sizeof(float));
}

void Slice::load_embedding(const uint16_t* data) {
  memcpy(embedding_, data, static_cast<size_t>(shape_.vocab_size) * shape_.hidden_size * 2);
}

void Slice::load_angles(const float* data) {
  memcpy(angles_.data(), data, sizeof(float) * shape_.context_tokens * shape_.head_dim);
}

void Slice::set_layer(int layer, int window, bool rotates) {
  layers_.at(layer).window = window;
  layers_.at(layer).rotates = rotates;
}

// --- a step ----------------------------------------------------------------------------------------------------

// Nothing is read or written before every index is known to be good.
void Slice::check(const StepArrays& step) const {
  for (int sequence = 0; sequence < step.num_sequences; ++sequence) {
    const int num_rows = step.first_rows[sequence + 1] - step.first_rows[sequence];
    const int num_blocks = step.first_blocks[sequence + 1] - step.first_blocks[sequence];
    const int64_t end = int64_t{step.positions[sequence]} + num_rows;
    const std::string name = "row " + std::to_string(sequence) + " of the step: ";
    if (num_rows <= 0 || step.positions[sequence] < 0 || end > int64_t{num_blocks} * shape_.block_tokens)
      throw std::invalid_argument(name + std::to_string(num_blocks) + " blocks cover " +
                                  std::to_string(int64_t{num_blocks} * shape_.block_tokens) +
                                  " tokens, but the step ends at position " + std::to_string(end));
    if (end > shape_.context_tokens)
      throw std::invalid_argument(name + "position " + std::to_string(end) + " is beyond context_tokens, " +
                                  std::to_string(shape_.context_tokens));
    for (int block = step.first_blocks[sequence]; block < step.first_blocks[sequence + 1]; ++block)
      if (step.blocks[block] < 0 || step.blocks[block] >= shape_.num_blocks)
        throw std::invalid_argument(name + "block id outside 0.." + std::to_string(shape_.num_blocks - 1));
  }
  if (shape_.has_embedding)
    for (int row = 0; row < step.num_rows; ++row)
      if (step.tokens[row] < 0 || step.tokens[row] >= shape_.vocab_size)
        throw std::invalid_argument("token " + std::to_string(step.tokens[row]) + " is outside the vocabulary, 0.." +
                                    std::to_string(shape_.vocab_size - 1));
}

// Cuts the step into tasks that are the same for every layer.
void Slice::plan(const StepArrays& step) {
  step_ = step;
  attention_tasks_.clear();
  append_tasks_.clear();
  for (int sequence = 0; sequence < step.num_sequences; ++sequence) {
    const int first_row = step.first_rows[sequence], num_rows = step.first_rows[sequence + 1] - first_row;
    const int position = step.positions[sequence];
    const int32_t* blocks = step.blocks + step.first_blocks[sequence];
    for (int head = 0; head < heads_.num_kv; ++head) {
      const int num_folded = num_rows * heads_.group();
      for (int first = 0; first < num_folded; first += kLane)
        attention_tasks_.push_back({blocks, position, first_row, head, first, std::min(kLane, num_folded - first)});
      for (int row = 0; row < num_rows;) {  // cut where units begin: one unit, one writer
        const int stop = std::min(num_rows, round_up(position + row + 1, kAppendRows) - position);
        append_tasks_.push_back({sequence, head, row, stop - row});
        row = stop;
      }
    }
  }
  hidden_.resize(sizeof(float) * step.num_rows * shape_.hidden_size);
  projected_.resize(sizeof(float) * step.num_rows * heads_.columns());
  for (Activation* activation : {&normed_, &attended_, &activated_}) activation->reserve(step.num_rows);
}

void Slice::forward(const StepArrays& step) {
  check(step);
  team_.settle();
  plan(step);
  team_.run([this](Member& member) { compute(member); });
}

void Slice::compute(Member& member) {
  const FlushTinyNumbers flush;
  configure_product(step_.num_rows);
  embed(member);
  for (int index = 0; index < shape_.num_layers; ++index) compute_layer(member, index);
  finish(member);
  _tile_release();
}

void Slice::embed(Member& member) {
  const int width = shape_.hidden_size;
  float* hidden = reinterpret_cast<float*>(hidden_.data());
  member.share(step_.num_rows, [&](int row) {
    float* to = hidden + static_cast<size_t>(row) * width;
    if (!shape_.has_embedding) {
      memcpy(to, step_.hidden_in + static_cast<size_t>(row) * width, width * sizeof(float));
    } else if (shape_.shares_embedding) {
      unpack_row(*head_, step_.tokens[row], to);
    } else {
      const uint16_t* from = embedding_ + static_cast<size_t>(step_.tokens[row]) * width;
      for (int k = 0; k < width; k += kLane) _mm512_storeu_ps(to + k, from_bf16(from + k));
    }
  });
}

void Slice::norm_rows(Member& member, const float* weight, Activation& into, const int32_t* rows, int num_rows) {
  const int width = shape_.hidden_size;
  const float* hidden = reinterpret_cast<const float*>(hidden_.data());
  float* normed = workers_[member.index]->row();
  member.share(divide_up(num_rows, kRowsPerChunk), [&](int chunk) {
    for (int row = chunk * kRowsPerChunk; row < std::min(num_rows, (chunk + 1) * kRowsPerChunk); ++row) {
      const size_t from = rows == nullptr ? row : rows[row];
      normalize(hidden + from * width, weight, width, shape_.norm_epsilon, normed);
      for (int k = 0; k < width; k += kLane) into.store(row, k, _mm512_loadu_ps(normed + k));
      into.seal(row);
    }
  });
}

void Slice::seal_rows(Member& member, Activation& activation) {
  if (!activation.integer) return;
  member.share(divide_up(step_.num_rows, kRowsPerChunk), [&](int chunk) {
    for (int row = chunk * kRowsPerChunk; row < std::min(step_.num_rows, (chunk + 1) * kRowsPerChunk); ++row)
      activation.seal(row);
  });
}

void Slice::compute_layer(Member& member, int index) {
  const Layer& layer = layers_[index];
  Worker& worker = *workers_[member.index];
  const int num_rows = step_.num_rows, width = shape_.hidden_size, columns = heads_.columns();
  float* hidden = reinterpret_cast<float*>(hidden_.data());
  float* projected = reinterpret_cast<float*>(projected_.data());
  const auto store = [](float* row, int limit, int panel, __m512 left, __m512 right) {
    const int column = panel * kPanelColumns;
    _mm512_mask_storeu_ps(row + column, first_lanes(limit - column), left);
    _mm512_mask_storeu_ps(row + column + kLane, first_lanes(limit - column - kLane), right);
  };
  const auto add_to_hidden = [&](int row, int panel, __m512 left, __m512 right) {
    float* to = hidden + static_cast<size_t>(row) * width;
    const int column = panel * kPanelColumns;
    left = _mm512_add_ps(left, _mm512_maskz_loadu_ps(first_lanes(width - column), to + column));
    right = _mm512_add_ps(right, _mm512_maskz_loadu_ps(first_lanes(width - column - kLane), to + column + kLane));
    store(to, width, panel, left, right);
  };

  norm_rows(member, layer.attention_norm, normed_, nullptr, num_rows);
  multiply(member, layer.query_key_value, normed_, num_rows, worker.scratch.data(),
           [&](int row, int panel, __m512 left, __m512 right) {
             store(projected + static_cast<size_t>(row) * columns, columns, panel, left, right);
           });
  attend(member, index);
  seal_rows(member, attended_);
  multiply(member, layer.output, attended_, num_rows, worker.scratch.data(), add_to_hidden);
  norm_rows(member, layer.mlp_norm, normed_, nullptr, num_rows);
  multiply(member, layer.gate_up, normed_, num_rows, worker.scratch.data(),
           [&](int row, int panel, __m512 gate, __m512 up) {
             activated_.store(row, panel * kLane, _mm512_mul_ps(silu_of(gate), up));
           });
  seal_rows(member, activated_);
  multiply(member, layer.down, activated_, num_rows, worker.scratch.data(), add_to_hidden);
}

void Slice::append(int index, const AppendTask& task, Worker& worker) {
  const Layer& layer = layers_[index];
  const int32_t* blocks = step_.blocks + step_.first_blocks[task.sequence];
  for (int row = task.row; row < task.row + task.num_rows; ++row) {
    const int position = step_.positions[task.sequence] + row;
    const size_t at = static_cast<size_t>(step_.first_rows[task.sequence] + row) * heads_.columns();
    const float* from = reinterpret_cast<const float*>(projected_.data()) + at + heads_.query_columns();
    const float* key = from + task.head * heads_.dim;
    const float* value = from + heads_.kv_columns() + task.head * heads_.dim;
    float* prepared = worker.row();
    prepare(layer, key, layer.key_norm, position, prepared);
    cache_.write(cache_.unit(index, blocks, task.head, position), position % kUnitTokens, prepared, value, heads_.dim);
  }
}

void Slice::prepare(const Layer& layer, const float* source, const float* norm, int position, float* out) const {
  if (shape_.has_head_norms) {
    normalize(source, norm, heads_.dim, shape_.norm_epsilon, out);
  } else {
    memcpy(out, source, heads_.dim * sizeof(float));
  }
  const float* angles = reinterpret_cast<const float*>(angles_.data()) + static_cast<size_t>(position) * heads_.dim;
  if (layer.rotates) rotate(out, angles, heads_.dim);
}

void Slice::attend(Member& member, int index) {
  const Layer& layer = layers_[index];
  Worker& worker = *workers_[member.index];
  member.share(static_cast<int>(append_tasks_.size()), [&](int task) { append(index, append_tasks_[task], worker); });
  member.share(static_cast<int>(attention_tasks_.size()), [&](int number) {
    const AttentionTask& task = attention_tasks_[number];
    const int group = heads_.group();
    for (int row = 0; row < task.num_rows; ++row) {
      const int folded = task.first + row, query_head = task.head * group + folded % group;
      const size_t at = static_cast<size_t>(task.first_row + folded / group) * heads_.columns();
      const float* query = reinterpret_cast<const float*>(projected_.data()) + at + query_head * heads_.dim;
      prepare(layer, query, layer.query_norm, task.position + folded / group, worker.row());
      worker.attention.set_query(row, worker.row());
    }
    worker.attention.run(cache_, index, task, layer.window, shape_.attention_scale);
    for (int row = 0; row < task.num_rows; ++row) {
      const int folded = task.first + row, query_head = task.head * group + folded % group;
      for (int d = 0; d < heads_.dim; d += kLane)
        attended_.store(task.first_row + folded / group, query_head * heads_.dim + d, worker.attention.result(row, d));
    }
  });
  worker.attention.forget_configuration();
  configure_product(step_.num_rows);
}

void Slice::finish(Member& member) {
  const int width = shape_.hidden_size;
  if (!shape_.has_head) {
    member.share(1, [&](int) { memcpy(step_.hidden_out, hidden_.data(), sizeof(float) * step_.num_rows * width); });
    return;
  }
  norm_rows(member, final_norm_, normed_, step_.sampled_rows, step_.num_samples);
  multiply(member, *head_, normed_, step_.num_samples, workers_[member.index]->scratch.data(),
           [&](int row, int panel, __m512 left, __m512 right) {
             float* to = step_.logits + static_cast<size_t>(row) * shape_.vocab_size + panel * kPanelColumns;
             const int rest = shape_.vocab_size - panel * kPanelColumns;
             _mm512_mask_storeu_ps(to, first_lanes(rest), left);
             _mm512_mask_storeu_ps(to + kLane, first_lanes(rest - kLane), right);
           });
}

}  // namespace manta

// --- C interface -----------------------------------------------------------------------------------------------

namespace {

thread_local std::string last_error;

template <class Work>
int guarded(const Work& work) {
  try {
    work();
    return 0;
  } catch (const std::invalid_argument& error) {
    last_error = error.what();
    return 1;
  } catch (const std::exception& error) {
    last_error = error.what();
    return 2;
  }
}

}  // namespace

using manta::Slice;

extern "C" {

const char* manta_last_error() { return last_error.c_str(); }

// Asks the kernel for the tile registers; every thread made afterwards may use them. 0, or an error number.
long manta_request_tiles() { return syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XTILEDATA */); }

int manta_create(const manta::SliceShape* shape, Slice** slice) {
  return guarded([&] { *slice = new Slice(*shape); });
}

void manta_destroy(Slice* slice) { delete slice; }

int manta_load_matrix(Slice* slice, int layer, int part, const void* data, const float* scales, int rows, int columns) {
  return guarded([&] { slice->load_matrix(layer, static_cast<manta::Part>(part), data, scales, rows, columns); });
}

int manta_load_bias(Slice* slice, int layer, int part, const float* data, int rows) {
  return guarded([&] { slice->load_bias(layer, static_cast<manta::Part>(part), data, rows); });
}

int manta_load_norm(Slice* slice, int layer, int part, const float* data, int width) {
  return guarded([&] { slice->load_norm(layer, static_cast<manta::NormPart>(part), data, width); });
}

void manta_load_embedding(Slice* slice, const uint16_t* data) { slice->load_embedding(data); }

void manta_load_angles(Slice* slice, const float* data) { slice->load_angles(data); }

int manta_set_layer(Slice* slice, int layer, int window, int rotates) {
  return guarded([&] { slice->set_layer(layer, window, rotates != 0); });
}

int64_t manta_weight_bytes(const Slice* slice) { return static_cast<int64_t>(slice->weight_bytes()); }

int manta_forward(Slice* slice, const manta::StepArrays* step) {
  return guarded([&] { slice->forward(*step); });
}

}  // extern "C"
