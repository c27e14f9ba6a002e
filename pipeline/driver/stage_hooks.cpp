#include "pipeline/driver/stage_hooks.h"

namespace espalier::driver {

Hooks hooks_of(const StageContext& context) {
  Progress& progress = context.progress;
  return {[&progress](const std::string& what, int64_t total, int64_t done) {
            progress.start(what, total, done);
          },
          [&progress](int64_t done) { progress.advance(done); },
          [&group = context.run.group] { return stop_requested(group); }};
}

}  // namespace espalier::driver
