#include "stages/compress/method.h"

#include <fmt/format.h>

#include <map>

#include "pipeline/errors.h"

namespace espalier::compress {
namespace {

std::map<std::string, std::unique_ptr<Method>>& registry() {
  static std::map<std::string, std::unique_ptr<Method>> methods;
  return methods;
}

}  // namespace

MethodRegistration::MethodRegistration(const std::string& name, std::unique_ptr<Method> method) {
  if (!registry().emplace(name, std::move(method)).second)
    throw DefectError(fmt::format("two compression methods are called {}", name));
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& [name, method] : registry()) names.push_back(name);
  return names;
}

const Method& method_of(const std::string& name) {
  const auto found = registry().find(name);
  if (found == registry().end())
    throw DefectError(fmt::format("no compression method is named '{}'", name));
  return *found->second;
}

void refuse_keys(const config::Section& section, const std::vector<std::string>& keys,
                 const std::string& why) {
  for (const std::string& key : keys)
    if (!section.is_null(key)) section.fail(key, why + "; set it to null");
  section.allow(keys);
}

void read_truncation(const config::Section& section, Settings& settings) {
  settings.rank = section.optional_integer("rank", {1, 1 << 20});
  settings.budget = section.optional_number("budget", {0, 1, true, false});
  if (settings.rank && settings.budget)
    section.fail("budget", "rank and budget are both set; set one of them to null");
  if (!settings.rank && !settings.budget)
    section.fail(
        "rank",
        "neither rank nor budget is set: give the mean truncation rank (compress.rank=64) or "
        "the share of the fine-tuned checkpoint's bytes (compress.budget=0.05)");
  if (!section.is_null("allocation"))
    settings.allocation = section.choice("allocation", {"uniform", "paper", "greedy"});
  section.allow({"allocation"});
  settings.prior = section.number_or("prior", settings.prior, {0, 1});
}

}  // namespace espalier::compress
