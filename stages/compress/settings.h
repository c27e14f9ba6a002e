#pragma once
/// What is asked of a compression.

#include <ATen/core/ScalarType.h>

#include <cstdint>
#include <optional>
#include <string>

namespace espalier::compress {

struct Settings {
  std::string method = "ere";
  std::optional<int64_t> rank;   ///< the mean truncation rank: Σ r (m + n) <= rank Σ (m + n)
  std::optional<double> budget;  ///< share of the fine-tuned tensors' bytes; one of the two
  int64_t bits = 4;              ///< of a stored entry: 1 to 8, or kHalfBits (float16)
  std::string allocation = "paper";
  double prior = 0.5;
  bool polar = true;
  bool fill_zeros = false;               ///< where the base has numbers and the model a mask
  at::ScalarType vectors = at::kHalf;    ///< float16 or float32
  at::ScalarType dtype = at::kBFloat16;  ///< of the decoded model
  uint64_t seed = 0;
};

}  // namespace espalier::compress
