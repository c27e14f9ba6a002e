#pragma once
/// The table at the end of a run: one line a stage.

#include <filesystem>
#include <vector>

#include "pipeline/driver/plan_of_run.h"

namespace espalier::driver {

/// Reads each stage's manifest and metrics and prints them to standard output.
void print_table(const std::filesystem::path& run_directory, const std::vector<Entry>& entries);

}  // namespace espalier::driver
