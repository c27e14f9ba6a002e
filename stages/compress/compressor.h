#pragma once
/// Two checkpoints in, residual.h5 and the decoded model out.
///
/// One whole matrix is a unit; matrices are spread over ranks and workers, longest predicted first
/// (m n min(m, n)). Every unit is journalled, so that a killed run goes on; results reach rank 0
/// through the journal. The same bits on any number of ranks and workers.

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "pipeline/comm/communicator.h"
#include "pipeline/driver/units.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/workers.h"
#include "stages/compress/settings.h"

namespace espalier::compress {

using driver::Hooks;

/// Writes into `directory`: residual.h5, model/ (derived from `base`: what changed, decoded, in
/// settings.dtype) and state/ (the journal, to be removed by the caller when all is finished).
///
/// Returns on every rank {"bytes", "share", "matrices": [{name, rows, columns, truncation_rank,
/// energy_kept, quantization_error, relative_error}], "certificate": {"lost_energy", "gap"}, ...}.
/// share = bytes of residual.h5 / bytes of the fine-tuned tensors; with a budget it is at most
/// that. Collective. Throws UserError when the models do not match or the budget does not hold even
/// what is stored whole, Requeue when asked to stop.
nlohmann::json compress_model(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
                              const std::filesystem::path& directory, const Settings& settings,
                              const comm::Communicator& group, Workers& workers,
                              const Hooks& hooks = {});

}  // namespace espalier::compress
