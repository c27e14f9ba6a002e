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

std::map<std::string, std::vector<std::string>>& keys_of_methods() {
  static std::map<std::string, std::vector<std::string>> keys;
  return keys;
}

}  // namespace

AdapterRegistration::AdapterRegistration(const std::string& name, AdapterFactory factory,
                                         const std::vector<std::string>& keys) {
  if (!registry().emplace(name, std::move(factory)).second)
    throw DefectError(fmt::format("two retraining methods are called {}", name));
  keys_of_methods()[name] = keys;
}

std::vector<std::string> adapter_keys(const std::string& method) {
  const auto found = keys_of_methods().find(method);
  return found == keys_of_methods().end() ? std::vector<std::string>() : found->second;
}

std::vector<std::string> adapter_keys() {
  std::vector<std::string> all;
  for (const auto& [name, keys] : keys_of_methods())
    all.insert(all.end(), keys.begin(), keys.end());
  return all;
}

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
