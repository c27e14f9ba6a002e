#pragma once
/// What is known of one distinct input of a block's matrices, over all calibration tokens.

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace espalier::prune {

/// The statistics to collect, and the memory that working with them takes.
struct Needs {
  bool gram = false;             ///< the Gram X^T X
  bool norms = false;            ///< column norms
  bool moments = false;          ///< means and variances
  int64_t bytes_per_weight = 5;  ///< of a block: in float32 with its mask, and the method's own
  bool any() const { return gram || norms || moments; }
};
inline Needs operator|(const Needs& a, const Needs& b) {
  return {a.gram || b.gram, a.norms || b.norms, a.moments || b.moments,
          std::max(a.bytes_per_weight, b.bytes_per_weight)};
}

/// One input's, as far as they were needed; N = number of calibration sequences, n inputs.
struct InputStatistics {
  at::Tensor gram;           ///< float64 [n, n]: 2/N sum of x^T x
  std::vector<float> norms;  ///< [n]: sqrt of the mean over sequences of sum x_j^2
  std::vector<float> means;  ///< [n]: mean over sequences of sum x_j (DSnoT's scale)
  /// [n]: mean of the biased variances inside each sequence, weighted by its tokens.
  std::vector<float> variances;
};

}  // namespace espalier::prune
