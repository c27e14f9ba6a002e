#pragma once
/// The directory of a sweep, of a run, and of one of a run's stages.

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/inspect/inspection.h"

namespace espalier::inspect {

std::vector<std::filesystem::path> runs_below(const std::filesystem::path& directory);
bool is_sweep(const std::filesystem::path& directory);  ///< holds runs
bool is_run(const std::filesystem::path& directory);
/// Finished (it has a manifest), or of the name of an entry in a run's directory.
bool is_stage(const std::filesystem::path& directory);

/// The object in a file; empty without the file. Throws UserError where it holds something else.
nlohmann::json read_object(const std::filesystem::path& file);
/// [{"name", "status", "seconds", "peak_bytes", "bytes", "taken_over_from"}] of a run: a stage
/// without a manifest is "unfinished", one that has not begun "due".
Facts stages_of(const std::filesystem::path& run);
/// "02-retrain: MESSAGE" of a run that failed; else empty.
std::string failure_of(const std::filesystem::path& run);

/// {"kind": "sweep", "members": [{"name", "finished", "stages", "failure"}]}
Facts describe_sweep(const std::filesystem::path& directory);

/// {"kind": "run", ..., "model", "seed", "in_use_by", "failure", "stages": stages_of()}
Facts describe_run(const std::filesystem::path& directory);

/// {"kind": "stage", "stage", "status", "key", "seconds", ..., "metrics": {...}, "outputs":
/// [{"name", "bytes"}]}: of an evaluation the figures that each task reports.
Facts describe_stage(const std::filesystem::path& directory);

}  // namespace espalier::inspect
