#pragma once
/// Whole matrices as units of work over ranks and the workers of each: the loop that carries them
/// out.

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/workers.h"

namespace espalier::driver {

/// What the loop tells and asks while it runs; rank 0's are shown. All are called by the rank's
/// first thread, on every rank alike.
struct Hooks {
  std::function<void(const std::string& what, int64_t total, int64_t done)> start;
  std::function<void(int64_t done)> advance;
  /// Collective: true when a signal asks to stop.
  std::function<bool()> stop_requested;
};

/// Runs body(unit) once for each unit of 0..costs.size()-1 that is not done, on some worker of some
/// rank, dealt longest first. `done` is this rank's knowledge; what any rank knows to be done
/// counts. Between rounds of a few units a worker, hears the hooks; throws Requeue (naming `what`)
/// when asked to stop. `count_done`: whether the units that are done are told of as work of an
/// earlier start; else only the others are counted. Collective.
void carry_out_units(const std::string& what, const std::vector<double>& costs,
                     std::vector<int64_t> done, const comm::Communicator& group, Workers& workers,
                     const Hooks& hooks, const std::function<void(int64_t unit)>& body,
                     bool count_done = true);

}  // namespace espalier::driver
