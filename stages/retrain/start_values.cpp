#include "stages/retrain/start_values.h"

#include <ATen/ATen.h>

#include "pipeline/random.h"

namespace espalier::retrain {

at::Tensor uniform_start(uint64_t seed, std::string_view purpose, std::string_view name,
                         at::IntArrayRef shape, double bound) {
  at::Tensor out = at::empty(shape, at::kFloat);
  const CounterRandom random(seed, purpose, stream_of(name));
  float* values = out.data_ptr<float>();
  for (int64_t i = 0; i < out.numel(); ++i)
    values[i] = static_cast<float>(random.uniform(static_cast<uint64_t>(i), -bound, bound));
  return out;
}

at::Tensor normal_start(uint64_t seed, std::string_view purpose, std::string_view name,
                        at::IntArrayRef shape, double deviation) {
  at::Tensor out = at::empty(shape, at::kFloat);
  const CounterRandom random(seed, purpose, stream_of(name));
  float* values = out.data_ptr<float>();
  for (int64_t i = 0; i < out.numel(); ++i)
    values[i] = static_cast<float>(deviation * random.normal(static_cast<uint64_t>(i)));
  return out;
}

}  // namespace espalier::retrain
