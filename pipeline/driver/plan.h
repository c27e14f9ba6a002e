#pragma once
/// --plan: what each entry of a run will do, told before anything runs.

#include <vector>

#include "pipeline/driver/plan_of_run.h"
#include "pipeline/driver/stage.h"

namespace espalier::driver {

/// Prints every entry: its stage, the model it takes, and what Stage::plan says. Reads names and
/// shapes of the model that the run starts from, no weights. Rank 0.
void print_plan(const std::vector<Entry>& entries, const Shared& shared, const RunContext& run);

}  // namespace espalier::driver
