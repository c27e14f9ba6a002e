#pragma once
/// A stage's progress and the signals, as loops over units hear them.

#include "pipeline/driver/stage.h"
#include "pipeline/driver/units.h"

namespace espalier::driver {

/// The context must outlive the hooks.
Hooks hooks_of(const StageContext& context);

}  // namespace espalier::driver
