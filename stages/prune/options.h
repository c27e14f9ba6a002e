#pragma once
/// What the `prune` node of a configuration asks for, beside its method's own keys.

#include <cstdint>
#include <vector>

#include "pipeline/config/section.h"
#include "stages/prune/layers.h"

namespace espalier::prune {

/// DSnoT (prune.refine: dsnot).
struct RefineOptions {
  bool dsnot = false;
  int64_t cycles = 50;
  double threshold = 0.1;
  bool skip_mlp = true;  ///< feed-forward matrices keep the first mask
};

/// OWL (prune.allocation: owl).
struct AllocationOptions {
  bool owl = false;
  double outlier_factor = 5;  ///< M: an entry this many times above the mean is an outlier
  double span = 0.08;         ///< lambda: sparsities spread over 2 lambda
};

struct Options {
  LayerChoice layers;
  int64_t samples = 128, sequence_length = 2048;
  int64_t unit = 1;            ///< calibration sequences computed as one
  bool masked_tokens = false;  ///< only tokens of the loss mask count in the statistics
  bool keep_zeros = true;
  AllocationOptions allocation;
  RefineOptions refine;
  bool refit = false;  ///< kept weights are solved for once more, on the mask
  int64_t refit_steps = 20;
  double damping = 0.01;  ///< of the Gram that the refit works with

  int64_t units() const { return (samples + unit - 1) / unit; }
  /// Every pattern that a matrix may get.
  std::vector<Pattern> patterns() const;
};

/// Throws UserError placed at the key: out of range, contradictory.
Options read_options(const config::Section& section);

}  // namespace espalier::prune
