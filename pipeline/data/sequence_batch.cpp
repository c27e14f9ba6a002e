#include "pipeline/data/sequence_batch.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <numeric>

#include "pipeline/errors.h"

namespace espalier::data {

void require_rows(const TokenSet& set, int64_t most_tokens) {
  for (int64_t d = 0; d < set.documents(); ++d) {
    const int64_t length = set.document_tokens(d);
    if (length < 1) throw UserError(fmt::format("{}: row {} has no token", set.path().string(), d));
    if (length > most_tokens)
      throw UserError(fmt::format(
          "{}: row {} has {} tokens, more than the {} of sequence_length or of the model; prepare "
          "the data with --length {}",
          set.path().string(), d, length, most_tokens, most_tokens));
  }
}

SequenceBatch sequence_batch(const TokenSet& set, std::span<const int64_t> documents) {
  const auto count = static_cast<int64_t>(documents.size());
  int64_t longest = 0;
  for (const int64_t d : documents) longest = std::max(longest, set.document_tokens(d));
  SequenceBatch batch{
      at::zeros({count, longest}, at::kLong), at::empty({count}, at::kLong), {}, {}};
  if (set.has_token_types()) batch.token_types = at::zeros_like(batch.tokens);
  if (set.is_classification())
    batch.labels = at::empty({count}, set.classes() == 0 ? at::kDouble : at::kLong);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t length = set.document_tokens(documents[i]);
    batch.tokens[i].narrow(0, 0, length).copy_(set.document(documents[i], 0, length));
    batch.visible[i] = length;
    if (batch.token_types.defined())
      batch.token_types[i].narrow(0, 0, length).copy_(set.token_types(documents[i], 0, length));
    if (batch.labels.defined()) batch.labels[i] = set.label(documents[i]);
  }
  return batch;
}

std::vector<std::vector<int64_t>> units_by_length(std::span<const int64_t> lengths,
                                                  int64_t unit_tokens, bool padded) {
  std::vector<int64_t> order(lengths.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return lengths[a] > lengths[b]; });
  std::vector<std::vector<int64_t>> units;
  int64_t sum = 0;  // of the last unit's lengths
  for (const int64_t row : order) {
    const auto grown = [&](const std::vector<int64_t>& unit) {
      return padded ? lengths[unit.front()] * (static_cast<int64_t>(unit.size()) + 1)
                    : sum + lengths[row];
    };
    if (units.empty() || grown(units.back()) > unit_tokens) {
      units.emplace_back();
      sum = 0;
    }
    units.back().push_back(row);
    sum += lengths[row];
  }
  return units;
}

}  // namespace espalier::data
