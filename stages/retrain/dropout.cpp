#include "stages/retrain/dropout.h"

#include <ATen/ATen.h>

#include <cmath>

#include "pipeline/random.h"

namespace espalier::retrain {

namespace {

template <class T>
void zero_dropped(T* values, int64_t count, double probability, const CounterRandom& random) {
  const double log_keep = std::log1p(-probability);
  double position = -1;
  for (uint64_t draw = 0;; ++draw) {
    position += 1 + std::floor(std::log(1.0 - random.uniform(draw)) / log_keep);
    if (!(position < static_cast<double>(count))) return;
    values[static_cast<int64_t>(position)] = T(0);
  }
}

}  // namespace

at::Tensor dropout(const at::Tensor& x, double probability, const UnitKey& key,
                   std::string_view layer) {
  if (key.evaluating || probability == 0) return x.contiguous();
  const at::NoGradGuard no_grad;
  at::Tensor out = at::mul(x, 1.0 / (1.0 - probability)).contiguous();
  const int64_t each = out.numel() / key.sequences;
  for (int64_t i = 0; i < key.sequences; ++i) {
    // One stream a (step, sequence, layer): the step and the sequence select inside the layer's.
    const uint64_t place = static_cast<uint64_t>(key.first_sequence + i) * 0x9E3779B97F4A7C15ull ^
                           static_cast<uint64_t>(key.step) * 0xD6E8FEB86659FD93ull;
    const CounterRandom random(key.seed, "dropout", stream_of(layer) ^ place);
    AT_DISPATCH_FLOATING_TYPES_AND(at::kBFloat16, out.scalar_type(), "dropout", [&] {
      zero_dropped(out.data_ptr<scalar_t>() + i * each, each, probability, random);
    });
  }
  return out;
}

}  // namespace espalier::retrain
