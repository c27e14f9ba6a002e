#pragma once
/// Which weights may go: `unstructured`, K kept of every M consecutive inputs of a row ("2:4"), or
/// whole attention heads of every block (`heads`).

#include <cstdint>
#include <string>

namespace espalier::prune {

struct Pattern {
  int64_t keep = 0, group = 0;  ///< K:M; 0:0 is unstructured
  double sparsity = 0.5;        ///< share of weights that go; 1 - K/M with K:M
  int64_t heads = 0;            ///< of every block that go; 0: weights go

  bool unstructured() const { return group == 0; }
  /// Unstructured: how many of so many weights go, floor(entries * sparsity).
  int64_t removed_of(int64_t entries) const;
  std::string name() const;  ///< "unstructured", "2:4" or "heads"
};

/// Parses "unstructured" or "K:M" (1 <= K < M <= 64); "heads" is the configuration's (layers.h).
/// Throws UserError stating the legal forms.
Pattern parse_pattern(const std::string& text, double sparsity_when_unstructured);

}  // namespace espalier::prune
