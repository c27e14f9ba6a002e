#pragma once
/// Several residuals of one base at once, as task vectors are added:
///
///   sum = base + sum_k weight_k * (decoded_k - base)
///
/// with decoded_k the tensor that residual k alone decodes to, masked where its file says so: a
/// zero of the base that every residual keeps stays exactly 0. Computed in float64 and rounded
/// once. Of one residual with weight 1 it is that residual's own decoding, to the bit. What has no
/// counterpart in the base (a new head, rows added to an embedding) and integers cannot be added:
/// the residuals that hold it must hold the same, else it is an error that names both; so with the
/// names of classes.

#include <filesystem>
#include <functional>
#include <vector>

#include "pipeline/io/checkpoint.h"

namespace espalier::compress {

struct Summands {
  std::vector<std::filesystem::path> files;
  std::vector<double> weights;  ///< one a file, or none: 1 each
};

/// Writes a derived model into `directory`: what the residuals change, in shards of at most 1 GiB.
/// Returns the type of its floating-point tensors, which the residuals must agree on. One rank; all
/// residuals and one tensor in memory. Throws UserError when a residual is not one of `base`, or
/// two contradict each other. `still_working` is called after every tensor.
at::ScalarType write_sum(
    const io::Checkpoint& base, const Summands& summands, const std::filesystem::path& directory,
    const std::function<void()>& still_working = [] {});

}  // namespace espalier::compress
