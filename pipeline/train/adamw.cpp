#include "pipeline/train/adamw.h"

#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/train/adamw_kernel.h"

namespace espalier::train {

Adamw::Adamw(int64_t size, AdamwOptions options)
    : options_(options), first_(size, 0.0f), second_(size, 0.0f) {}

void Adamw::update(std::span<float> values, std::span<const float> gradient, int64_t begin,
                   double learning_rate, int64_t step) {
  if (values.size() != gradient.size() || begin < 0 || begin + values.size() > first_.size())
    throw DefectError("AdamW: values and gradient differ in size or lie outside the moments");
  // Scalars in double, rounded once, as torch hands them to its kernels.
  const double correction1 = 1.0 - std::pow(options_.beta1, static_cast<double>(step));
  const double correction2 = 1.0 - std::pow(options_.beta2, static_cast<double>(step));
  const AdamwScalars scalars{
      .keep = static_cast<float>(1.0 - learning_rate * options_.weight_decay),
      .lerp1 = static_cast<float>(1.0 - options_.beta1),
      .beta2 = static_cast<float>(options_.beta2),
      .rest2 = static_cast<float>(1.0 - options_.beta2),
      .root2 = static_cast<float>(std::sqrt(correction2)),
      .eps = static_cast<float>(options_.eps),
      .negative_step = static_cast<float>(-learning_rate / correction1)};
  adamw_step(scalars, values.data(), gradient.data(), first_.data() + begin, second_.data() + begin,
             static_cast<int64_t>(values.size()));
}

double gradient_norm(std::span<const float> gradient) {
  double sum = 0;
  for (const float g : gradient) sum += static_cast<double>(g) * static_cast<double>(g);
  return std::sqrt(sum);
}

double clip_gradient(std::span<float> gradient, double max_norm) {
  const double norm = gradient_norm(gradient);
  if (max_norm <= 0) return norm;
  const double factor = max_norm / (norm + 1e-6);
  if (factor >= 1.0) return norm;
  const auto scale = static_cast<float>(factor);
  for (float& g : gradient) g *= scale;
  return norm;
}

}  // namespace espalier::train
