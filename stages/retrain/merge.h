#pragma once
/// What a retraining leaves: adapters.h5, and a derived model of the merged matrices.

#include <filesystem>

#include "pipeline/comm/communicator.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/train/parameters.h"
#include "pipeline/workers.h"
#include "stages/retrain/adapted_model.h"

namespace espalier::retrain {

struct MergeReport {
  int64_t nonzeros_before = 0, nonzeros_after = 0;  ///< of the adapted matrices
  int64_t filled = 0;                               ///< zeros that became something else
};

/// Writes every parameter (float32) under its name, with the method and the base's checksum.
void write_adapters(const std::filesystem::path& file, const train::ParameterSet& parameters,
                    const std::string& method, const std::string& base_checksum);

/// Writes `directory` as a model derived from `base`: one file a block, blocks dealt over ranks.
/// Collective. With `masked`, a zero that became something else is a DefectError naming the matrix;
/// otherwise it is counted. Throws NumericalError naming the matrix when it is not finite.
MergeReport write_merged(const std::filesystem::path& directory, const io::Checkpoint& base,
                         const AdaptedModel& model, const Adapter& adapter, bool masked,
                         Workers& workers, const comm::Communicator& group);

}  // namespace espalier::retrain
