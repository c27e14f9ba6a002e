#pragma once
/// `espalier status RUN_DIR`: how far a run or a sweep is, told from outside while it works.

#include <filesystem>

#include "pipeline/inspect/inspection.h"

namespace espalier::inspect {

/// Of a run: {"kind": "run", "state", "in_use_by", "failure", "stage", "progress", "stages"}, with
/// "progress" as progress.json has it (driver/progress.h) and "told_seconds_ago"; rate and time
/// left of one that works alone. The states:
///   working    a start has it
///   silent     a start has it and gave no sign of life for as long as a lock is held without one
///   failed     the last start ended in an error
///   stopped    no start has it, and stages are due: the same command goes on
///   finished
/// Of a sweep: {"kind": "sweep", how many are in each state, "members": [{"name", "state",
/// "finished", "stages", "stage", "progress", "failure"}]}; a member that has not begun is "due".
/// Throws UserError naming the path when it is neither.
Facts status(const std::filesystem::path& path);

}  // namespace espalier::inspect
