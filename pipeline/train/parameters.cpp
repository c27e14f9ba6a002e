#include "pipeline/train/parameters.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/errors.h"

namespace espalier::train {

ParameterSet::ParameterSet(std::vector<Parameter> parameters) : parameters_(std::move(parameters)) {
  int64_t size = 0;
  for (Parameter& parameter : parameters_) {
    if (parameter.value.scalar_type() != at::kFloat)
      throw DefectError(fmt::format("{}: parameters are float32", parameter.name));
    parameter.offset = size;
    size += parameter.value.numel();
  }
  flat_ = at::empty({size}, at::kFloat);
  for (Parameter& parameter : parameters_) {
    const at::Tensor view =
        flat_.narrow(0, parameter.offset, parameter.value.numel()).view(parameter.value.sizes());
    view.copy_(parameter.value.detach());
    parameter.value = view.detach();
    parameter.value.set_requires_grad(true);
  }
}

std::span<float> ParameterSet::flat() {
  return {flat_.data_ptr<float>(), static_cast<size_t>(flat_.numel())};
}

std::span<const float> ParameterSet::flat() const {
  return {flat_.const_data_ptr<float>(), static_cast<size_t>(flat_.numel())};
}

}  // namespace espalier::train
