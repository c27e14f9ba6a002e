#pragma once
/// A token data set: the HDF5 file that launch/prepare_data.py writes, checked and read in ranges.
///
/// /tokens     int32 [tokens]        every document's tokens, one after the other
/// /offsets    int64 [documents + 1] document d is tokens[offsets[d] : offsets[d + 1]]
/// /loss_mask  uint8 [tokens]        optional: 1 where the token counts in the loss
/// kind "glue", a document being a row of a classification or regression task:
/// /labels       int64 [documents]   classes from 0, or float32 numbers where `classes` is 0
/// /token_types  uint8 [tokens]      optional: 0 in the first sentence, 1 in the second
/// kind "choices", a document being a question's context with one of its choices (loss_mask is 1 on
/// the choice):
/// /choice_of   int64 [documents]    the row's question, counted from 0, ascending
/// /labels      int64 [questions]    the right choice, counted from 0 within the question
/// /characters  int64 [documents]    of the choice's text
/// attributes of "/": kind, tokenizer_checksum (optional), vocabulary_size, end_token; for
/// glue task, classes, label_names (one a line); for choices shots
///
/// The file is hostile: types, shapes, offsets and every id are checked when it is opened. Tokens
/// stay in the file; a set of any size costs its offsets.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace espalier::data {

class TokenSet {
 public:
  /// Reads the file once in pieces (ids and checksum). Throws UserError naming file, dataset and
  /// the offending number.
  static TokenSet open(const std::filesystem::path& file);

  const std::filesystem::path& path() const;
  /// "text", "instruction", "choices", "glue".
  const std::string& kind() const;
  /// SHA-256 of the tokenizer.json that made it; empty when the set does not say (see tokenizer.h).
  const std::string& tokenizer_checksum() const;
  int64_t vocabulary_size() const;
  /// -1 when the tokenizer has none: a stream then has nothing between its documents.
  int64_t end_token() const;
  /// Of tokens, offsets and loss mask: metrics carry it, so that figures on different data differ.
  const std::string& checksum() const;

  int64_t documents() const;
  int64_t document_tokens(int64_t document) const;
  bool has_loss_mask() const;
  /// int64 [count] of one document, from its token `begin`.
  at::Tensor document(int64_t document, int64_t begin, int64_t count) const;
  /// bool [count]: which of those tokens count in the loss (all, without a mask).
  at::Tensor loss_mask(int64_t document, int64_t begin, int64_t count) const;

  /// Rows of a classification or regression task; false for any other kind.
  bool is_classification() const;
  /// "RTE"; empty where the set names none.
  const std::string& task() const;
  /// Classes of the task, whether or not all occur; 0 when the labels are numbers.
  int64_t classes() const;
  /// [classes]; empty where the labels are numbers.
  const std::vector<std::string>& label_names() const;
  /// Of a document (glue) or a question (choices).
  double label(int64_t index) const;
  bool has_token_types() const;
  /// int64 [count] of one document; zeros without token types.
  at::Tensor token_types(int64_t document, int64_t begin, int64_t count) const;

  /// 0 unless the kind is "choices".
  int64_t questions() const;
  /// The choices of a question are the documents [first_choice(q), first_choice(q + 1)).
  int64_t first_choice(int64_t question) const;
  int64_t characters(int64_t document) const;
  /// Solved examples in front of every question.
  int64_t shots() const;

  /// The set as one stream: documents in order, the end token after each when there are several.
  int64_t stream_tokens() const;
  /// int64 [count] of the stream. Reads only the documents the range touches.
  at::Tensor stream(int64_t begin, int64_t count) const;
  /// bool [count], as loss_mask(); an end token counts when its document's last token does.
  at::Tensor stream_loss_mask(int64_t begin, int64_t count) const;

  /// Throws UserError with both numbers unless the model's vocabulary is the set's.
  void require_vocabulary(int64_t model_vocabulary_size, const std::string& model) const;
  /// Throws UserError with both numbers when the whole stream is shorter than one window.
  void require_stream(int64_t sequence_length) const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

}  // namespace espalier::data
