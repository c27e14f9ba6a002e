#pragma once
/// Learning-rate schedules with linear warm-up, as transformers' get_*_schedule_with_warmup.

#include <cstdint>
#include <optional>
#include <string>

namespace espalier::train {

enum class Decay { linear, cosine, constant };

struct Schedule {
  Decay decay = Decay::linear;
  int64_t warmup_steps = 0, total_steps = 0;

  /// Factor on the peak rate at `step`, counted from 0: step / warmup_steps during the warm-up, then
  /// linear to 0, half a cosine to 0, or 1.
  double factor(int64_t step) const;
};

/// warmup_steps when given, otherwise ceil(ratio * total_steps) (transformers' rounding). Throws
/// UserError when the warm-up is longer than the training.
Schedule make_schedule(const std::string& decay, int64_t total_steps,
                       std::optional<int64_t> warmup_steps, double warmup_ratio);

}  // namespace espalier::train
