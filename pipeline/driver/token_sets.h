#pragma once
/// The token sets that the stages of a run read: what they hold is part of those stages' keys, and
/// each must come from the tokenizer of the model.

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "pipeline/driver/plan_of_run.h"
#include "pipeline/driver/stage.h"

namespace espalier::driver {

/// By the path that the stage names; every set is read once.
using TokenSetChecksums = std::map<std::filesystem::path, std::string>;

TokenSetChecksums checksums_of_token_sets(const std::vector<Entry>& entries, const RunContext& run);

/// Throws UserError naming both files when a set was made by another tokenizer than the
/// tokenizer.json at the root of `model`. Rank 0 looks, and warns of sets that do not say; a model
/// without that file is taken at its word.
void require_tokenizer(const TokenSetChecksums& sets, const RunContext& run,
                       const std::filesystem::path& model);

}  // namespace espalier::driver
