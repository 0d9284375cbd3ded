#include "slice.h"

#include <sys/syscall.h>
#include <unistd.h>

namespace manta {

namespace {

constexpr int kRowsPerChunk = 4;
constexpr int kAppendRows = 64;  // a multiple of a unit's tokens
constexpr int kPhasesPerLayer = 14;

// Stores both halves of a panel into a row, but nothing from column `limit` on.
inline void store_panel(float* row, int limit, int panel, __m512 left, __m512 right) {
  const int column = panel * kPanelColumns;
  _mm512_mask_storeu_ps(row + column, first_lanes(limit - column), left);
  _mm512_mask_storeu_ps(row + column + kLane, first_lanes(limit - column - kLane), right);
}

inline void add_panel(float* row, int limit, int panel, __m512 left, __m512 right) {
  const int column = panel * kPanelColumns;
  left = _mm512_add_ps(left, _mm512_maskz_loadu_ps(first_lanes(limit - column), row + column));
  right = _mm512_add_ps(right, _mm512_maskz_loadu_ps(first_lanes(limit - column - kLane), row + column + kLane));
  store_panel(row, limit, panel, left, right);
}

}  // namespace

// What a member keeps for itself.
struct Slice::Worker {
  Worker(Heads heads, size_t scratch_bytes, int widest)
      : attention(heads), scratch(scratch_bytes), vector(widest * sizeof(float)) {}

  float* row() const { return reinterpret_cast<float*>(vector.data()); }

  Attention attention;
  Buffer scratch;  // unpacked panels
  Buffer vector;   // one row
};

Slice::Slice(const SliceShape& shape)
    : weights(shape),
      shape_(shape),
      heads_{shape.num_query_heads, shape.num_kv_heads, shape.head_dim},
      cache_(heads_, shape.num_layers, shape.num_blocks, shape.block_tokens),
      normed_(shape.hidden_size, is_integer(static_cast<Format>(shape.format))),
      attended_(heads_.query_columns(), is_integer(static_cast<Format>(shape.format))),
      activated_(shape.intermediate_size, is_integer(static_cast<Format>(shape.format))),
      team_(shape.num_threads, shape.num_layers * kPhasesPerLayer + 8) {
  const size_t scratch = weights.scratch_bytes(shape.num_threads);
  for (int index = 0; index < shape.num_threads; ++index)
    workers_.push_back(std::make_unique<Worker>(heads_, scratch, std::max(shape.hidden_size, shape.head_dim)));
}

void Slice::check_sequence(const StepArrays& step, int sequence) const {
  const int num_rows = step.first_rows[sequence + 1] - step.first_rows[sequence];
  const int num_blocks = step.first_blocks[sequence + 1] - step.first_blocks[sequence];
  const int64_t end = int64_t{step.positions[sequence]} + num_rows;
  const int64_t covered = int64_t{num_blocks} * shape_.block_tokens;
  const std::string name = "sequence " + std::to_string(sequence) + " of the step: ";
  if (num_rows <= 0 || step.positions[sequence] < 0 || end > covered)
    throw std::invalid_argument(name + std::to_string(num_blocks) + " blocks cover " + std::to_string(covered) +
                                " tokens, but the step ends at position " + std::to_string(end));
  if (end > shape_.context_tokens)
    throw std::invalid_argument(name + "position " + std::to_string(end) + " is beyond context_tokens, " +
                                std::to_string(shape_.context_tokens));
  for (int block = step.first_blocks[sequence]; block < step.first_blocks[sequence + 1]; ++block)
    if (step.blocks[block] < 0 || step.blocks[block] >= shape_.num_blocks)
      throw std::invalid_argument(name + "block id outside 0.." + std::to_string(shape_.num_blocks - 1));
}

void Slice::set_num_adapters(int num_adapters) {
  num_adapters_ = num_adapters;
  additions_.resize(num_adapters > 0 ? shape_.num_layers : 0);
  if (num_adapters == 0) return;
  for (Activation* activation : {&normed_, &attended_, &activated_}) activation->keep_floats();
}

void Slice::load_adapter(int adapter, int layer, Part part, const float* down, const float* up, float scale, int rank,
                         int num_rows, int num_columns) {
  const auto [matrix, place] = weights.find(layer, part);
  if (part == Part::kHead || num_columns != matrix->width || adapter >= num_adapters_)
    throw std::invalid_argument("an adapter of another width than the configuration's, or one too many");
  LayerAdditions& at = additions_.at(layer);
  const Layer& fused = weights.layer(layer);
  Additions& additions = matrix == &fused.query_key_value ? at.query_key_value
                         : matrix == &fused.output        ? at.output
                         : matrix == &fused.gate_up       ? at.gate_up
                                                          : at.down;
  additions.load(adapter, place, down, up, scale, rank, num_rows, *matrix);
  thin_width_ = std::max(thin_width_, static_cast<size_t>(additions.num_projected(adapter)));
}

void Slice::check(const StepArrays& step) const {
  for (int sequence = 0; step.adapters != nullptr && sequence < step.num_sequences; ++sequence)
    if (step.adapters[sequence] < -1 || step.adapters[sequence] >= num_adapters_)
      throw std::invalid_argument("sequence " + std::to_string(sequence) + " of the step names an unknown adapter");
  for (int sequence = 0; sequence < step.num_sequences; ++sequence) check_sequence(step, sequence);
  if (!shape_.has_embedding) return;
  for (int row = 0; row < step.num_rows; ++row)
    if (step.tokens[row] < 0 || step.tokens[row] >= shape_.vocab_size)
      throw std::invalid_argument("token " + std::to_string(step.tokens[row]) + " is outside the vocabulary, 0.." +
                                  std::to_string(shape_.vocab_size - 1));
}

// Which adapter each row has, and neighbouring rows with the same one as tasks.
void Slice::plan_adapters(const StepArrays& step) {
  project_tasks_.clear();
  if (step.adapters == nullptr) return;
  row_adapters_.resize(step.num_rows);
  for (int sequence = 0; sequence < step.num_sequences; ++sequence)
    std::fill(&row_adapters_[step.first_rows[sequence]], row_adapters_.data() + step.first_rows[sequence + 1],
              step.adapters[sequence]);
  for (int row = 0; row < step.num_rows;) {
    int stop = row + 1;
    while (stop < step.num_rows && stop - row < kProjectRows && row_adapters_[stop] == row_adapters_[row]) ++stop;
    if (row_adapters_[row] >= 0) project_tasks_.push_back({row, stop - row, row_adapters_[row]});
    row = stop;
  }
  if (!project_tasks_.empty()) thin_.resize(sizeof(float) * step.num_rows * thin_width_);
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
  plan_adapters(step);
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
  const size_t width = shape_.hidden_size;
  member.share(step_.num_rows, [&](int row) {
    if (shape_.has_embedding) return weights.look_up(step_.tokens[row], hidden(row));
    memcpy(hidden(row), step_.hidden_in + row * width, width * sizeof(float));
  });
}

// The norm of the step's rows, or of those listed in `rows`, ready for a product.
void Slice::norm_rows(Member& member, const float* weight, Activation& into, const int32_t* rows, int num_rows) {
  const int width = shape_.hidden_size;
  float* normed = workers_[member.index]->row();
  member.share(divide_up(num_rows, kRowsPerChunk), [&](int chunk) {
    for (int row = chunk * kRowsPerChunk; row < std::min(num_rows, (chunk + 1) * kRowsPerChunk); ++row) {
      normalize(hidden(rows == nullptr ? row : rows[row]), weight, width, shape_.norm_epsilon, normed);
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

// As multiply(), for all rows of the step, with what their adapters add.
template <class Emit>
void Slice::multiply_adapted(Member& member, const Additions* additions, const Matrix& matrix, const Activation& input,
                             const Emit& emit) {
  char* scratch = workers_[member.index]->scratch.data();
  if (additions == nullptr || project_tasks_.empty() || additions->empty())
    return multiply(member, matrix, input, step_.num_rows, scratch, emit);
  member.share(static_cast<int>(project_tasks_.size()), [&](int index) {
    const ProjectTask& task = project_tasks_[index];
    additions->project(task, input.values(task.row), matrix.width, thin(task.row), thin_width_);
  });
  multiply(member, matrix, input, step_.num_rows, scratch, [&](int row, int panel, __m512 left, __m512 right) {
    if (row_adapters_[row] >= 0) additions->add(row_adapters_[row], panel, thin(row), left, right);
    emit(row, panel, left, right);
  });
}

void Slice::compute_layer(Member& member, int index) {
  const Layer& layer = weights.layer(index);
  const LayerAdditions* more = additions_.empty() ? nullptr : &additions_[index];
  const int num_rows = step_.num_rows, width = shape_.hidden_size;
  const auto add_to_hidden = [&](int row, int panel, __m512 left, __m512 right) {
    add_panel(hidden(row), width, panel, left, right);
  };
  const auto project = [&](int row, int panel, __m512 left, __m512 right) {
    store_panel(projected(row), heads_.columns(), panel, left, right);
  };
  const auto activate = [&](int row, int panel, __m512 gate, __m512 up) {
    activated_.store(row, panel * kLane, _mm512_mul_ps(silu_of(gate), up));
  };
  norm_rows(member, layer.attention_norm, normed_, nullptr, num_rows);
  multiply_adapted(member, more ? &more->query_key_value : nullptr, layer.query_key_value, normed_, project);
  attend(member, index);
  seal_rows(member, attended_);
  multiply_adapted(member, more ? &more->output : nullptr, layer.output, attended_, add_to_hidden);
  norm_rows(member, layer.mlp_norm, normed_, nullptr, num_rows);
  multiply_adapted(member, more ? &more->gate_up : nullptr, layer.gate_up, normed_, activate);
  seal_rows(member, activated_);
  multiply_adapted(member, more ? &more->down : nullptr, layer.down, activated_, add_to_hidden);
}

// A head's query or key before it is used: its norm, where there is one, and its rotation.
void Slice::prepare(const Layer& layer, const float* source, const float* norm, int position, float* out) const {
  if (shape_.has_head_norms) {
    normalize(source, norm, heads_.dim, shape_.norm_epsilon, out);
  } else {
    memcpy(out, source, heads_.dim * sizeof(float));
  }
  if (layer.rotates) rotate(out, weights.angles(position), heads_.dim);
}

void Slice::append(int index, const AppendTask& task, Worker& worker) {
  const Layer& layer = weights.layer(index);
  const int32_t* blocks = step_.blocks + step_.first_blocks[task.sequence];
  for (int row = task.row; row < task.row + task.num_rows; ++row) {
    const int position = step_.positions[task.sequence] + row;
    const float* from = projected(step_.first_rows[task.sequence] + row) + heads_.query_columns();
    const float* value = from + heads_.kv_columns() + task.head * heads_.dim;
    prepare(layer, from + task.head * heads_.dim, layer.key_norm, position, worker.row());
    char* unit = cache_.unit(index, blocks, task.head, position);
    cache_.write(unit, position % kUnitTokens, worker.row(), value, heads_.dim);
  }
}

void Slice::attend_task(int index, const AttentionTask& task, Worker& worker) {
  const Layer& layer = weights.layer(index);
  const int group = heads_.group();
  for (int row = 0; row < task.num_rows; ++row) {
    const int at = (task.first + row) / group, query_head = task.head * group + (task.first + row) % group;
    const float* query = projected(task.first_row + at) + query_head * heads_.dim;
    prepare(layer, query, layer.query_norm, task.position + at, worker.row());
    worker.attention.set_query(row, worker.row());
  }
  worker.attention.run(cache_, index, task, layer.window, shape_.attention_scale);
  for (int row = 0; row < task.num_rows; ++row) {
    const int at = (task.first + row) / group, query_head = task.head * group + (task.first + row) % group;
    for (int d = 0; d < heads_.dim; d += kLane)
      attended_.store(task.first_row + at, query_head * heads_.dim + d, worker.attention.result(row, d));
  }
}

void Slice::attend(Member& member, int index) {
  Worker& worker = *workers_[member.index];
  member.share(static_cast<int>(append_tasks_.size()), [&](int task) { append(index, append_tasks_[task], worker); });
  member.share(static_cast<int>(attention_tasks_.size()),
               [&](int task) { attend_task(index, attention_tasks_[task], worker); });
  worker.attention.forget_configuration();
  configure_product(step_.num_rows);
}

// The last slice's logits, or the activations for the next one.
void Slice::finish(Member& member) {
  const size_t width = shape_.hidden_size;
  if (!shape_.has_head) {
    member.share(step_.num_rows,
                 [&](int row) { memcpy(step_.hidden_out + row * width, hidden(row), width * sizeof(float)); });
    return;
  }
  const size_t vocabulary = shape_.vocab_size;
  norm_rows(member, weights.final_norm(), normed_, step_.sampled_rows, step_.num_samples);
  multiply(member, weights.head(), normed_, step_.num_samples, workers_[member.index]->scratch.data(),
           [&](int row, int panel, __m512 left, __m512 right) {
             store_panel(step_.logits + row * vocabulary, shape_.vocab_size, panel, left, right);
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

int manta_load_matrix(Slice* slice, int layer, int part, const void* data, const float* scales, const float* minima,
                      int rows, int columns) {
  const auto which = static_cast<manta::Part>(part);
  return guarded([&] { slice->weights.load_matrix(layer, which, data, scales, minima, rows, columns); });
}

int manta_load_bias(Slice* slice, int layer, int part, const float* data, int rows) {
  return guarded([&] { slice->weights.load_bias(layer, static_cast<manta::Part>(part), data, rows); });
}

int manta_set_num_adapters(Slice* slice, int num_adapters) {
  return guarded([&] { slice->set_num_adapters(num_adapters); });
}

int manta_load_adapter(Slice* slice, int adapter, int layer, int part, const float* down, const float* up, float scale,
                       int rank, int rows, int columns) {
  const auto which = static_cast<manta::Part>(part);
  return guarded([&] { slice->load_adapter(adapter, layer, which, down, up, scale, rank, rows, columns); });
}

int manta_load_norm(Slice* slice, int layer, int part, const float* data, int width) {
  return guarded([&] { slice->weights.load_norm(layer, static_cast<manta::NormPart>(part), data, width); });
}

void manta_load_embedding(Slice* slice, const uint16_t* data) { slice->weights.load_embedding(data); }

void manta_load_angles(Slice* slice, const float* data) { slice->weights.load_angles(data); }

int manta_set_layer(Slice* slice, int layer, int window, int rotates) {
  return guarded([&] { slice->weights.set_layer(layer, window, rotates != 0); });
}

int64_t manta_weight_bytes(const Slice* slice) { return static_cast<int64_t>(slice->weights.bytes()); }

int manta_forward(Slice* slice, const manta::StepArrays* step) {
  return guarded([&] { slice->forward(*step); });
}

}  // extern "C"
