#pragma once
/// The directory of a sweep, of a run, and of one of a run's stages.

#include <filesystem>

#include "pipeline/inspect/inspection.h"

namespace espalier::inspect {

bool is_sweep(const std::filesystem::path& directory);  ///< holds runs
bool is_run(const std::filesystem::path& directory);
/// Finished (it has a manifest), or of the name of an entry in a run's directory.
bool is_stage(const std::filesystem::path& directory);

/// {"kind": "sweep", "members": [{"name", "finished", "stages", "failure"}]}
Facts describe_sweep(const std::filesystem::path& directory);

/// {"kind": "run", ..., "model", "seed", "in_use_by", "failure", "stages": [{"name", "status",
/// "seconds", "peak_bytes", "bytes"}]}: a stage without a manifest is "unfinished", one that has
/// not begun "due".
Facts describe_run(const std::filesystem::path& directory);

/// {"kind": "stage", "stage", "status", "key", "seconds", ..., "metrics": {...}, "outputs":
/// [{"name", "bytes"}]}: of an evaluation the figures that each task reports.
Facts describe_stage(const std::filesystem::path& directory);

}  // namespace espalier::inspect
