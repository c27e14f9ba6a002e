#pragma once
/// One run: a composed configuration carried out in one directory, stage after stage.

#include <string>

#include "pipeline/comm/communicator.h"
#include "pipeline/config/compose.h"
#include "pipeline/driver/shared_stages.h"
#include "pipeline/errors.h"

namespace espalier::driver {

/// A sweep's member that an earlier start ended with a NumericalError, at the same computation: the
/// same bits would end it again. On all ranks.
struct Diverged : NumericalError {
  using NumericalError::NumericalError;
};

/// Checks everything that can be checked, then carries out the pipeline's entries; an entry whose
/// manifest has the same key and whose outputs are intact is kept. A member of a sweep takes over
/// what its siblings have finished. Collective.
///
/// Throws UserError (configuration, data, a run.dir of another configuration), EnvironmentError,
/// NumericalError (of a sweep's member Diverged), and Requeue when a signal asked for the end and
/// everything is saved.
void carry_out(const config::Composition& composition, comm::Communicator group,
               SharedStages* siblings = nullptr);

/// All that carry_out() does before its first write. Collective; throws as it does.
void check(const config::Composition& composition, comm::Communicator group);

/// The first entry of the pipeline that is not finished in the run's directory, and why where that
/// is known; empty when all are. What another configuration left there does not count. Reads
/// manifests alone, not the outputs. By one rank.
std::string what_is_due(const config::Composition& composition);

/// --plan: reads and checks all that carry_out() does before its first write, and prints what each
/// entry will do. Writes nothing. Collective; throws as carry_out() does.
void plan(const config::Composition& composition, comm::Communicator group);

}  // namespace espalier::driver
