#pragma once
/// What a training run goes on from: parameters, AdamW's moments, the step, the gradients' grid.
/// Windows, order and dropout are counter-based, so that nothing else is needed.

#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

namespace espalier::train {

struct StepCheckpoint {
  int64_t step = 0;  ///< steps done
  int64_t tokens = 0;
  double loss_first = 0, loss_last = 0, seconds = 0;
  std::string fingerprint;  ///< of everything the steps depend on
  std::vector<float> values, first_moment, second_moment;
  std::vector<double> largest;  ///< per segment, the previous step's largest unit: the next grid
  int64_t validations = 0, best_step = 0;
  int64_t unimproved = 0;          ///< validations since the best one
  double best_score = 0;           ///< of best_step, when there were any
  std::vector<float> best_values;  ///< empty: the last ones are kept, or none was validated
};

/// One HDF5 file, replaced whole: a kill at any moment leaves the older or the newer one.
void write_step_checkpoint(const std::filesystem::path& file, const StepCheckpoint& checkpoint);

/// Nothing when there is no file. Throws UserError when it is damaged (its checksum is verified) or
/// belongs to another training (`fingerprint`, sizes).
std::optional<StepCheckpoint> read_step_checkpoint(const std::filesystem::path& file,
                                                   const std::string& fingerprint,
                                                   int64_t parameters, int64_t segments);

}  // namespace espalier::train
