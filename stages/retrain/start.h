#pragma once
/// What a retraining starts from: a new adapter, a stored one, or the one beside its model.

#include <optional>
#include <string>

#include "pipeline/driver/stage.h"
#include "pipeline/io/checkpoint.h"
#include "stages/retrain/adapter_file.h"
#include "stages/retrain/options.h"

namespace espalier::retrain {

struct Start {
  std::string base_checksum;            ///< of the model without what this training replaces
  std::optional<StoredAdapter> stored;  ///< nothing: new
};

/// adapters.h5 of the key adapter_from: the file itself, or in that directory.
std::filesystem::path adapter_file_of(const std::string& adapter_from);

/// Reads and checks the stored adapter against method and base. `previous`: that of the stage which
/// wrote what stands beside the model's matrices; StoredAdapter::require_beside is still to be
/// called. Every rank calls it. Throws UserError with both checksums for another base, with both
/// methods or settings.
Start find_start(const RetrainOptions& options, const AdapterMethod& method,
                 const io::Checkpoint& model, const comm::Communicator& group);

/// index_sets.h5 of the key, or of the last stage before `stage_directory` that left one; empty:
/// none.
std::filesystem::path find_index_sets(const RetrainOptions& options,
                                      const std::filesystem::path& stage_directory);

}  // namespace espalier::retrain
