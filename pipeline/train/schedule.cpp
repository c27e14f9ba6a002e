#include "pipeline/train/schedule.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numbers>

#include "pipeline/errors.h"

namespace espalier::train {

double Schedule::factor(int64_t step) const {
  if (step < warmup_steps) return static_cast<double>(step) / static_cast<double>(warmup_steps);
  const double decaying = static_cast<double>(std::max<int64_t>(1, total_steps - warmup_steps));
  switch (decay) {
    case Decay::constant:
      return 1.0;
    case Decay::linear:
      return std::max(0.0, static_cast<double>(total_steps - step) / decaying);
    case Decay::cosine: {
      const double progress = static_cast<double>(step - warmup_steps) / decaying;
      return std::max(0.0, 0.5 * (1.0 + std::cos(std::numbers::pi * progress)));
    }
  }
  throw DefectError("a schedule without a shape");
}

Schedule make_schedule(const std::string& decay, int64_t total_steps,
                       std::optional<int64_t> warmup_steps, double warmup_ratio) {
  Schedule schedule;
  schedule.total_steps = total_steps;
  if (decay == "linear")
    schedule.decay = Decay::linear;
  else if (decay == "cosine")
    schedule.decay = Decay::cosine;
  else if (decay == "constant")
    schedule.decay = Decay::constant;
  else
    throw UserError(fmt::format("schedule '{}' is none of linear, cosine, constant", decay));
  schedule.warmup_steps = warmup_steps.value_or(
      static_cast<int64_t>(std::ceil(warmup_ratio * static_cast<double>(total_steps))));
  if (schedule.warmup_steps > total_steps)
    throw UserError(
        fmt::format("a warm-up of {} steps is longer than the training of {} steps; lower "
                    "warmup_steps or raise steps",
                    schedule.warmup_steps, total_steps));
  return schedule;
}

}  // namespace espalier::train
