#pragma once
/// The run's own files: config.yaml, environment.json, and the refusal of a directory that belongs
/// to another configuration.

#include <filesystem>
#include <string>

#include "pipeline/config/compose.h"
#include "pipeline/driver/plan_of_run.h"

namespace espalier::driver {

/// By rank 0 alone. Throws UserError naming the first key that differs and both values when the
/// directory holds a run of another configuration (cluster and run.resume may differ); with
/// resume = false an earlier run's files are removed instead.
void open_run_directory(const config::Composition& composition, const Shared& shared,
                        const comm::Communicator& group);

}  // namespace espalier::driver
