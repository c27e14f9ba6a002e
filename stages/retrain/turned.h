#pragma once
/// Multiplied weights: y = dropout(x) (H_out W H_in)^T, either of the two maps being absent.
///
/// Where the target has a mask, (H_out W H_in) * kept is formed once a step. Without one neither it
/// nor H is formed: x and x W^T are turned, one product forward and one backward.
/// Dropout acts on all that the matrix reads, as in the program of ETHER's authors.

#include <memory>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "stages/retrain/adapted_matrix.h"
#include "stages/retrain/block_map.h"

namespace espalier::retrain {

/// Which side of a matrix is turned, and in how many diagonal blocks.
struct TurnedOptions {
  bool input = true, output = false;
  int64_t blocks = 1;
  double dropout = 0;
};
/// Reads `side` (input | output | both), `blocks` and `dropout`.
TurnedOptions read_turned_options(const config::Section& section, const TurnedOptions& defaults);

/// A method that turns matrices: it says what the map of a side is.
class TurnedMethod : public MatrixMethod {
 public:
  explicit TurnedMethod(const TurnedOptions& options) : options_(options) {}
  void check(const std::string& matrix, int64_t rows, int64_t columns) const override;
  int64_t trainable_parameters(int64_t rows, int64_t columns) const override;
  nlohmann::json settings() const override;

 protected:
  /// The map of a side of `width` of the matrix.
  virtual std::unique_ptr<BlockMap> map(const Target& target, int64_t width) const = 0;
  /// Trainable parameters of that map.
  virtual int64_t parameters_of_side(int64_t width) const = 0;
  std::unique_ptr<AdaptedMatrix> make(Target target, const AttachOptions&) const override;
  const TurnedOptions& options() const { return options_; }

 private:
  TurnedOptions options_;
};

}  // namespace espalier::retrain
