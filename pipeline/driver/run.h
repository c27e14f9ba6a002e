#pragma once
/// One run: a composed configuration carried out in one directory, stage after stage.

#include "pipeline/comm/communicator.h"
#include "pipeline/config/compose.h"
#include "pipeline/driver/shared_stages.h"

namespace espalier::driver {

/// Checks everything that can be checked, then carries out the pipeline's entries; an entry whose
/// manifest has the same key and whose outputs are intact is kept. A member of a sweep takes over
/// what its siblings have finished. Collective.
///
/// Throws UserError (configuration, data, a run.dir of another configuration), EnvironmentError,
/// NumericalError, and Requeue when a signal asked for the end and everything is saved.
void carry_out(const config::Composition& composition, comm::Communicator group,
               SharedStages* siblings = nullptr);

/// All that carry_out() does before its first write. Collective; throws as it does.
void check(const config::Composition& composition, comm::Communicator group);

/// What ended an earlier start of this very run by a NumericalError, "DIRECTORY: STAGE: message";
/// empty without one. The same bits would end it again. Collective.
std::string diverged_before(const config::Composition& composition,
                            const comm::Communicator& group);

/// --plan: reads and checks all that carry_out() does before its first write, and prints what each
/// entry will do. Writes nothing. Collective; throws as carry_out() does.
void plan(const config::Composition& composition, comm::Communicator group);

}  // namespace espalier::driver
