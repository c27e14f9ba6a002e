#pragma once
/// The directory of a run, and that of one of its stages.

#include <filesystem>

#include "pipeline/inspect/inspection.h"

namespace espalier::inspect {

bool is_run(const std::filesystem::path& directory);
bool is_stage(const std::filesystem::path& directory);

/// {"kind": "run", "model", "seed", "host", "ranks", "owner", "failure", "stages": [{"entry",
/// "status", "seconds", "peak_bytes", ...}]}: a stage without a manifest is "unfinished", one that
/// has not begun "due".
Facts describe_run(const std::filesystem::path& directory);

/// {"kind": "stage", "stage", "status", "seconds", "ranks", ..., "outputs": [{"name", "bytes"}]}.
Facts describe_stage(const std::filesystem::path& directory);

}  // namespace espalier::inspect
