#pragma once
/// The run's own files: config.yaml, environment.json, and the refusal of a directory that belongs
/// to another configuration.

#include <filesystem>
#include <memory>
#include <string>

#include "pipeline/config/compose.h"
#include "pipeline/driver/plan_of_run.h"
#include "pipeline/driver/run_lock.h"

namespace espalier::driver {

/// Throws UserError when the directory holds a run of another configuration that would have to be
/// gone on with, EnvironmentError when it cannot be written. Leaves nothing. By rank 0 alone.
void check_run_directory(const config::Composition& composition, const Shared& shared);

/// By rank 0 alone. The directory is this start's until the lock goes. Throws UserError naming the
/// first key that differs and both values when the directory holds a run of another configuration
/// (cluster and run.resume may differ), before the lock is taken and again under it; with resume =
/// false an earlier run's files are removed instead. Throws EnvironmentError when another start
/// works in it.
[[nodiscard]] std::unique_ptr<RunLock> open_run_directory(const config::Composition& composition,
                                                          const Shared& shared,
                                                          const comm::Communicator& group);

/// Whether it is a directory with the name of an entry's ("03-evaluate").
bool is_stage_directory(const std::filesystem::path& path);

}  // namespace espalier::driver
