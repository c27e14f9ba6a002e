#pragma once
/// The model that a retraining leaves: a derived directory of the merged matrices, or of what stays
/// beside them, and of everything else that was trained.

#include <filesystem>
#include <optional>

#include "pipeline/comm/communicator.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/workers.h"
#include "stages/retrain/adapted_model.h"

namespace espalier::retrain {

/// Of the adapted matrices.
struct MergeReport {
  int64_t elements = 0;
  int64_t nonzeros_before = 0, nonzeros_after = 0;  ///< beside: the terms' numbers are added
  int64_t filled = 0;                               ///< zeros that became something else
  /// Merged: elements that are not what they were. A change below half a step of the model's type
  /// is rounded away.
  int64_t changed = 0;
  double weight_distance = 0;  ///< |W' - W| / |W|, Frobenius norms over all of them, as written
  /// The mean |H - I| (Frobenius) of the maps that multiply them; nothing when there are none.
  std::optional<double> map_distance;

  /// Of the zeros before, the share that was filled.
  double share_filled() const {
    const int64_t zeros = elements - nonzeros_before;
    return zeros > 0 ? static_cast<double>(filled) / static_cast<double>(zeros) : 0.0;
  }
};

/// Writes `directory` as a model derived from `base`: one file a block, blocks dealt over ranks,
/// and one file of what stands outside the blocks (norms and embeddings in the model's type, a head
/// in float32). Collective; adapter and parameters as they are, prepare_step done.
///
/// Merge::masked: a zero that became something else is a DefectError naming the matrix; dense: it
/// is counted; beside: the terms are written (pipeline/model/added_terms.h), added to those that
/// were there. Throws NumericalError naming the matrix when it is not finite.
MergeReport write_model(const std::filesystem::path& directory, const io::Checkpoint& base,
                        const AdaptedModel& model, Merge merge, Workers& workers,
                        const comm::Communicator& group);

}  // namespace espalier::retrain
