#include "pipeline/data/token_set.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/hdf5.h"

namespace espalier::data {

namespace {

constexpr int64_t kPiece = int64_t{1} << 22;  // elements read at a time when the whole file is read
constexpr int64_t kMostClasses = 100000;
constexpr int64_t kKeptTokens = int64_t{1} << 24;  // a set up to this size stays in memory

[[noreturn]] void fail(const std::filesystem::path& file, const std::string& message) {
  throw UserError(fmt::format("{}: {}; make the file anew with launch/prepare_data.py",
                              file.string(), message));
}

int64_t vector_length(const io::Hdf5Reader& reader, const std::filesystem::path& file,
                      const std::string& dataset) {
  if (!reader.has(dataset)) fail(file, fmt::format("there is no dataset {}", dataset));
  const std::vector<int64_t> shape = reader.shape(dataset);
  if (shape.size() != 1)
    fail(file, fmt::format("{} has {} dimensions, 1 is expected", dataset, shape.size()));
  return shape[0];
}

std::string bytes_checksum(const at::Tensor& values) {
  return io::checksum(std::span(static_cast<const std::byte*>(values.const_data_ptr()),
                                static_cast<size_t>(values.nbytes())));
}

}  // namespace

struct TokenSet::State {
  explicit State(const std::filesystem::path& path) : path(path), reader(path) {}

  std::filesystem::path path;
  io::Hdf5Reader reader;
  std::string kind, tokenizer_checksum, checksum;
  int64_t vocabulary_size = 0, end_token = 0, tokens = 0;
  bool has_loss_mask = false, has_token_types = false;
  std::vector<int64_t> offsets;
  at::Tensor kept_tokens, kept_mask, kept_types;  // the whole datasets when the set is small
  std::string task;
  int64_t classes = 0, shots = 0;
  std::vector<std::string> label_names;
  std::vector<double> labels;
  std::vector<int64_t> first_choices, characters;  // [questions + 1], [documents]
  mutable std::mutex reading;                      // HDF5 is not for several threads, workers are

  int64_t documents() const { return static_cast<int64_t>(offsets.size()) - 1; }
  int64_t separators() const { return documents() > 1 && end_token >= 0 ? 1 : 0; }
  /// Where document d starts in the stream.
  int64_t stream_offset(int64_t d) const { return offsets[d] + d * separators(); }

  void read_attributes();
  void read_offsets();
  void check_tokens();
  at::Tensor check_flags(const std::string& dataset);
  void read_labels(int64_t expected);
  void read_task();
  void read_choices();
  at::Tensor tokens_at(int64_t begin, int64_t count) const {
    if (kept_tokens.defined()) return kept_tokens.narrow(0, begin, count);
    const std::lock_guard lock(reading);
    return reader.read("/tokens", at::kInt, begin, count);
  }
  at::Tensor mask_at(int64_t begin, int64_t count) const {
    if (!has_loss_mask) return at::ones({count}, at::kByte);
    if (kept_mask.defined()) return kept_mask.narrow(0, begin, count);
    const std::lock_guard lock(reading);
    return reader.read("/loss_mask", at::kByte, begin, count);
  }
  at::Tensor gather_stream(int64_t begin, int64_t count, at::ScalarType type,
                           const std::function<at::Tensor(int64_t, int64_t)>& read,
                           const std::function<int64_t(int64_t)>& separator) const;
};

void TokenSet::State::read_attributes() {
  for (const char* name : {"kind", "vocabulary_size", "end_token"})
    if (!reader.has_attribute("/", name)) fail(path, fmt::format("attribute {} is missing", name));
  kind = reader.text_attribute("/", "kind");
  if (reader.has_attribute("/", "tokenizer_checksum"))
    tokenizer_checksum = reader.text_attribute("/", "tokenizer_checksum");
  vocabulary_size = reader.integer_attribute("/", "vocabulary_size");
  end_token = reader.integer_attribute("/", "end_token");
  if (vocabulary_size <= 0)
    fail(path, fmt::format("vocabulary_size {} is not positive", vocabulary_size));
  if (end_token < -1 || end_token >= vocabulary_size)
    fail(path, fmt::format("end_token {} is outside [0, {}) and not -1 (none)", end_token,
                           vocabulary_size));
}

void TokenSet::State::read_offsets() {
  tokens = vector_length(reader, path, "/tokens");
  if (vector_length(reader, path, "/offsets") < 2 || tokens == 0)
    fail(path, "the data set is empty: it has no document with a token");
  const at::Tensor values = reader.read("/offsets", at::kLong).contiguous();
  const int64_t* data = values.const_data_ptr<int64_t>();
  offsets.assign(data, data + values.numel());
  if (offsets.front() != 0) fail(path, fmt::format("offsets[0] is {}, not 0", offsets.front()));
  for (size_t d = 1; d < offsets.size(); ++d)
    if (offsets[d] < offsets[d - 1])
      fail(path, fmt::format("offsets[{}] = {} is below offsets[{}] = {}", d, offsets[d], d - 1,
                             offsets[d - 1]));
  if (offsets.back() != tokens)
    fail(path,
         fmt::format("the last offset is {}, but there are {} tokens", offsets.back(), tokens));
  checksum += bytes_checksum(values);
}

void TokenSet::State::check_tokens() {
  for (int64_t begin = 0; begin < tokens; begin += kPiece) {
    const at::Tensor piece =
        reader.read("/tokens", at::kInt, begin, std::min(kPiece, tokens - begin)).contiguous();
    const int32_t* ids = piece.const_data_ptr<int32_t>();
    for (int64_t i = 0; i < piece.numel(); ++i)
      if (ids[i] < 0 || ids[i] >= vocabulary_size)
        fail(path, fmt::format("token {} is {}, outside the vocabulary [0, {})", begin + i, ids[i],
                               vocabulary_size));
    checksum += bytes_checksum(piece);
  }
  if (tokens <= kKeptTokens) kept_tokens = reader.read("/tokens", at::kInt).contiguous();
}

/// A dataset of one byte a token: its length and its part of the checksum. Returns the whole of it
/// when the set is small enough to stay in memory.
at::Tensor TokenSet::State::check_flags(const std::string& dataset) {
  const int64_t length = vector_length(reader, path, dataset);
  if (length != tokens)
    fail(path, fmt::format("{} has {} entries for {} tokens", dataset, length, tokens));
  for (int64_t begin = 0; begin < tokens; begin += kPiece) {
    const at::Tensor piece =
        reader.read(dataset, at::kByte, begin, std::min(kPiece, tokens - begin)).contiguous();
    if (piece.max().item<int64_t>() > 1)
      fail(path,
           fmt::format("{} holds {}; 0 and 1 are read", dataset, piece.max().item<int64_t>()));
    checksum += bytes_checksum(piece);
  }
  return tokens <= kKeptTokens ? reader.read(dataset, at::kByte).contiguous() : at::Tensor();
}

/// /labels, classes unless `classes` is 0.
void TokenSet::State::read_labels(int64_t expected) {
  const int64_t length = vector_length(reader, path, "/labels");
  if (length != expected)
    fail(path, fmt::format("/labels has {} entries for {} rows", length, expected));
  const bool numbers = kind == "glue" && classes == 0;
  const at::Tensor values = reader.read("/labels", numbers ? at::kFloat : at::kLong).contiguous();
  checksum += bytes_checksum(values);
  const at::Tensor wide = values.to(at::kDouble);
  labels.assign(wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel());
}

void TokenSet::State::read_task() {
  for (const char* name : {"task", "classes"})
    if (!reader.has_attribute("/", name)) fail(path, fmt::format("attribute {} is missing", name));
  task = reader.text_attribute("/", "task");
  classes = reader.integer_attribute("/", "classes");
  if (classes < 0 || classes == 1 || classes > kMostClasses)
    fail(path,
         fmt::format("classes is {}; 0 (numbers) or 2 to {} are read", classes, kMostClasses));
  std::string names;
  if (reader.has_attribute("/", "label_names")) names = reader.text_attribute("/", "label_names");
  for (size_t begin = 0; begin < names.size();) {
    const size_t end = std::min(names.find('\n', begin), names.size());
    label_names.push_back(names.substr(begin, end - begin));
    begin = end + 1;
  }
  if (static_cast<int64_t>(label_names.size()) != classes)
    fail(path, fmt::format("label_names has {} lines for {} classes", label_names.size(), classes));
  read_labels(documents());
  for (size_t d = 0; d < labels.size(); ++d)
    if (classes == 0 ? !std::isfinite(labels[d])
                     : labels[d] < 0 || labels[d] >= static_cast<double>(classes))
      fail(path, fmt::format("label {} is {}; the task has {} classes", d, labels[d], classes));
  has_token_types = reader.has("/token_types");
  if (has_token_types) kept_types = check_flags("/token_types");
}

void TokenSet::State::read_choices() {
  const auto integers = [&](const char* dataset) {
    const int64_t length = vector_length(reader, path, dataset);
    if (length != documents())
      fail(path, fmt::format("{} has {} entries for {} rows", dataset, length, documents()));
    const at::Tensor values = reader.read(dataset, at::kLong).contiguous();
    checksum += bytes_checksum(values);
    const int64_t* data = values.const_data_ptr<int64_t>();
    return std::vector<int64_t>(data, data + values.numel());
  };
  if (!has_loss_mask) fail(path, "there is no dataset /loss_mask");
  const std::vector<int64_t> choice_of = integers("/choice_of");
  for (int64_t row = 0; row < documents(); ++row) {
    const auto question = static_cast<int64_t>(first_choices.size()) - 1;
    if (choice_of[row] == question + 1)
      first_choices.push_back(row);
    else if (row == 0 || choice_of[row] != question)
      fail(path, fmt::format("choice_of[{}] is {} after {}; questions ascend by one from 0", row,
                             choice_of[row], question));
  }
  first_choices.push_back(documents());
  characters = integers("/characters");
  for (int64_t row = 0; row < documents(); ++row)
    if (characters[row] < 1)
      fail(path, fmt::format("characters[{}] is {}, not positive", row, characters[row]));
  const auto questions = static_cast<int64_t>(first_choices.size()) - 1;
  read_labels(questions);
  for (int64_t q = 0; q < questions; ++q)
    if (labels[q] < 0 || labels[q] >= static_cast<double>(first_choices[q + 1] - first_choices[q]))
      fail(path, fmt::format("label {} is {}; the question has {} choices", q, labels[q],
                             first_choices[q + 1] - first_choices[q]));
  if (reader.has_attribute("/", "shots")) shots = reader.integer_attribute("/", "shots");
}

at::Tensor TokenSet::State::gather_stream(int64_t begin, int64_t count, at::ScalarType type,
                                          const std::function<at::Tensor(int64_t, int64_t)>& read,
                                          const std::function<int64_t(int64_t)>& separator) const {
  const int64_t length = stream_offset(documents());
  if (begin < 0 || count < 0 || count > length - begin)
    throw DefectError(fmt::format("{}: stream range [{}, {}) of {} tokens", path.string(), begin,
                                  begin + count, length));
  // The last document that starts at or before `begin`; offsets + d is increasing in d.
  int64_t low = 0, high = documents() - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (stream_offset(middle) <= begin)
      low = middle;
    else
      high = middle - 1;
  }
  at::Tensor out = at::empty({count}, type);
  int64_t filled = 0;
  for (int64_t d = low; filled < count; ++d) {
    const int64_t inside = begin + filled - stream_offset(d);
    const int64_t take = std::min(offsets[d + 1] - offsets[d] - inside, count - filled);
    if (take > 0) {
      out.narrow(0, filled, take).copy_(read(offsets[d] + inside, take));
      filled += take;
    }
    if (separators() && filled < count) out[filled++] = separator(d);
  }
  return out;
}

TokenSet TokenSet::open(const std::filesystem::path& file) {
  auto state = std::make_shared<State>(file);
  state->read_attributes();
  state->read_offsets();
  state->check_tokens();
  state->has_loss_mask = state->reader.has("/loss_mask");
  if (state->has_loss_mask) state->kept_mask = state->check_flags("/loss_mask");
  if (state->kind == "glue") state->read_task();
  if (state->kind == "choices") state->read_choices();
  state->checksum = io::checksum(state->checksum);
  TokenSet set;
  set.state_ = std::move(state);
  return set;
}

const std::filesystem::path& TokenSet::path() const { return state_->path; }
const std::string& TokenSet::kind() const { return state_->kind; }
const std::string& TokenSet::tokenizer_checksum() const { return state_->tokenizer_checksum; }
int64_t TokenSet::vocabulary_size() const { return state_->vocabulary_size; }
int64_t TokenSet::end_token() const { return state_->end_token; }
const std::string& TokenSet::checksum() const { return state_->checksum; }
int64_t TokenSet::documents() const { return state_->documents(); }
bool TokenSet::has_loss_mask() const { return state_->has_loss_mask; }

int64_t TokenSet::document_tokens(int64_t document) const {
  return state_->offsets.at(document + 1) - state_->offsets.at(document);
}

bool TokenSet::is_classification() const { return kind() == "glue"; }
const std::string& TokenSet::task() const { return state_->task; }
int64_t TokenSet::classes() const { return state_->classes; }
const std::vector<std::string>& TokenSet::label_names() const { return state_->label_names; }
double TokenSet::label(int64_t index) const { return state_->labels.at(index); }
bool TokenSet::has_token_types() const { return state_->has_token_types; }
int64_t TokenSet::questions() const {
  return std::max<int64_t>(0, static_cast<int64_t>(state_->first_choices.size()) - 1);
}
int64_t TokenSet::first_choice(int64_t question) const {
  return state_->first_choices.at(question);
}
int64_t TokenSet::characters(int64_t document) const { return state_->characters.at(document); }
int64_t TokenSet::shots() const { return state_->shots; }

at::Tensor TokenSet::token_types(int64_t document, int64_t begin, int64_t count) const {
  if (!state_->has_token_types) return at::zeros({count}, at::kLong);
  const int64_t first = state_->offsets.at(document) + begin;
  if (state_->kept_types.defined()) return state_->kept_types.narrow(0, first, count).to(at::kLong);
  const std::lock_guard lock(state_->reading);
  return state_->reader.read("/token_types", at::kByte, first, count).to(at::kLong);
}

at::Tensor TokenSet::document(int64_t document, int64_t begin, int64_t count) const {
  if (begin < 0 || count < 0 || count > document_tokens(document) - begin)
    throw DefectError(fmt::format("{}: range [{}, {}) of document {} with {} tokens",
                                  path().string(), begin, begin + count, document,
                                  document_tokens(document)));
  return state_->tokens_at(state_->offsets[document] + begin, count).to(at::kLong);
}

at::Tensor TokenSet::loss_mask(int64_t document, int64_t begin, int64_t count) const {
  return state_->mask_at(state_->offsets.at(document) + begin, count).to(at::kBool);
}

int64_t TokenSet::stream_tokens() const { return state_->stream_offset(documents()); }

at::Tensor TokenSet::stream(int64_t begin, int64_t count) const {
  const State& state = *state_;
  return state.gather_stream(
      begin, count, at::kLong, [&](int64_t at, int64_t n) { return state.tokens_at(at, n); },
      [&](int64_t) { return state.end_token; });
}

at::Tensor TokenSet::stream_loss_mask(int64_t begin, int64_t count) const {
  const State& state = *state_;
  return state.gather_stream(
      begin, count, at::kBool, [&](int64_t at, int64_t n) { return state.mask_at(at, n); },
      [&](int64_t d) {
        if (!state.has_loss_mask || state.offsets[d] == state.offsets[d + 1]) return int64_t{1};
        return state.mask_at(state.offsets[d + 1] - 1, 1).item<int64_t>();
      });
}

void TokenSet::require_vocabulary(int64_t model_vocabulary_size, const std::string& model) const {
  if (vocabulary_size() != model_vocabulary_size)
    throw UserError(fmt::format(
        "{}: made with a vocabulary of {} tokens, but the model {} has {}; prepare the data with "
        "this model's tokenizer",
        path().string(), vocabulary_size(), model, model_vocabulary_size));
}

void TokenSet::require_stream(int64_t sequence_length) const {
  if (stream_tokens() < sequence_length)
    throw UserError(fmt::format(
        "{}: holds {} tokens, but sequence_length asks for windows of {}; give more text or a "
        "shorter sequence_length",
        path().string(), stream_tokens(), sequence_length));
}

}  // namespace espalier::data
