#include "stages/retrain/adapter.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <map>

#include "pipeline/errors.h"

namespace espalier::retrain {

namespace {

std::map<std::string, AdapterFactory>& registry() {
  static std::map<std::string, AdapterFactory> factories;
  return factories;
}

std::vector<std::string>& keys_of_methods() {
  static std::vector<std::string> keys;
  return keys;
}

}  // namespace

AdapterRegistration::AdapterRegistration(const std::string& name, AdapterFactory factory,
                                         const std::vector<std::string>& keys) {
  if (!registry().emplace(name, std::move(factory)).second)
    throw DefectError(fmt::format("two retraining methods are called {}", name));
  keys_of_methods().insert(keys_of_methods().end(), keys.begin(), keys.end());
}

const std::vector<std::string>& adapter_keys() { return keys_of_methods(); }

std::vector<std::string> adapter_names() {
  std::vector<std::string> names;
  for (const auto& [name, factory] : registry()) names.push_back(name);
  return names;
}

std::unique_ptr<AdapterMethod> make_adapter_method(const std::string& name,
                                                   const config::Section& section) {
  const auto found = registry().find(name);
  if (found == registry().end())
    section.fail("method", fmt::format("'{}' is not one of the methods built in: {}", name,
                                       fmt::join(adapter_names(), ", ")));
  return found->second(section);
}

}  // namespace espalier::retrain
