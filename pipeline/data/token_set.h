#pragma once
/// A token data set: the HDF5 file that launch/prepare_data.py writes, checked and read in ranges.
///
/// /tokens     int32 [tokens]        every document's tokens, one after the other
/// /offsets    int64 [documents + 1] document d is tokens[offsets[d] : offsets[d + 1]]
/// /loss_mask  uint8 [tokens]        optional: 1 where the token counts in the loss
/// attributes of "/": kind, tokenizer_checksum (optional), vocabulary_size, end_token
///
/// The file is hostile: types, shapes, offsets and every id are checked when it is opened. Tokens
/// stay in the file; a set of any size costs its offsets.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

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
