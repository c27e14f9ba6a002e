#include "stages/discover/method.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <map>

#include "pipeline/errors.h"

namespace espalier::discover {

namespace {

std::map<std::string, MethodFactory>& registry() {
  static std::map<std::string, MethodFactory> factories;
  return factories;
}

}  // namespace

MethodRegistration::MethodRegistration(const std::string& name, MethodFactory factory) {
  if (!registry().emplace(name, std::move(factory)).second)
    throw DefectError(fmt::format("two methods of discovery are called {}", name));
}

std::unique_ptr<Method> make_method(const config::Section& section) {
  const std::string name = section.text("method");
  const auto found = registry().find(name);
  if (found != registry().end()) return found->second(section);
  std::vector<std::string> names;
  for (const auto& [known, factory] : registry()) names.push_back(known);
  section.fail("method", fmt::format("'{}' is not one of the methods built in: {}", name,
                                     fmt::join(names, ", ")));
}

double squares_outside(const at::Tensor& weight, const std::vector<int64_t>& positions) {
  const float* values = weight.const_data_ptr<float>();
  double sum = 0;
  for (int64_t i = 0; i < weight.numel(); ++i) sum += double(values[i]) * values[i];
  for (const int64_t position : positions) sum -= double(values[position]) * values[position];
  return std::max(0.0, sum) / 2;
}

}  // namespace espalier::discover
