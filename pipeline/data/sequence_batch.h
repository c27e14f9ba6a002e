#pragma once
/// Rows of a set as units of a fixed composition: rows of like length share a unit, padded to its
/// longest, so that little is computed for the padding and nothing depends on ranks.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <span>
#include <vector>

#include "pipeline/data/token_set.h"

namespace espalier::data {

/// Documents padded behind to the longest of them.
struct SequenceBatch {
  at::Tensor tokens;       ///< int64 [sequences, length]
  at::Tensor visible;      ///< int64 [sequences]: tokens before the padding
  at::Tensor token_types;  ///< int64 [sequences, length]; undefined when the set has none
  at::Tensor labels;       ///< [sequences] int64 classes or float64 numbers; undefined without
};

/// Throws UserError naming the first document without tokens, or with more than `most_tokens`: a
/// labelled row is never cut here, where its second sentence would be lost.
void require_rows(const TokenSet& set, int64_t most_tokens);

SequenceBatch sequence_batch(const TokenSet& set, std::span<const int64_t> documents);

/// Numbers 0..n-1 by falling length (ties to the lower number), cut into units of at most
/// `unit_tokens` tokens, one number at least; `padded`: each counts as the longest of its unit.
/// Falling, so that the longest work is begun first.
std::vector<std::vector<int64_t>> units_by_length(std::span<const int64_t> lengths,
                                                  int64_t unit_tokens, bool padded = true);

}  // namespace espalier::data
