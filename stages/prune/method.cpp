#include "stages/prune/method.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <set>

#include "pipeline/errors.h"

namespace espalier::prune {
namespace {

/// Written out with a value for every method, so that being set says nothing.
const std::set<std::string> kWithDefault = {"block_size"};
struct Entry {
  MethodFactory factory;
  std::vector<std::string> own_keys;
  bool reads(const std::string& key) const {
    return std::find(own_keys.begin(), own_keys.end(), key) != own_keys.end();
  }
};

std::map<std::string, Entry>& registry() {
  static std::map<std::string, Entry> entries;
  return entries;
}

void refuse_keys_of_others(const config::Section& section, const std::string& method) {
  std::set<std::string> keys;
  for (const auto& [name, entry] : registry())
    keys.insert(entry.own_keys.begin(), entry.own_keys.end());
  for (const std::string& key : keys) {
    if (registry().at(method).reads(key)) continue;
    section.allow({key});
    if (section.is_null(key) || kWithDefault.contains(key)) continue;
    std::vector<std::string> readers;
    for (const auto& [name, entry] : registry())
      if (entry.reads(key)) readers.push_back(name);
    section.fail(key, fmt::format("method {} does not read it (read by: {}); set it to null",
                                  method, fmt::join(readers, ", ")));
  }
}

}  // namespace

std::optional<int64_t> PruningMethod::zeros(const Pattern& pattern, int64_t rows,
                                            int64_t columns) const {
  if (pattern.unstructured()) return std::nullopt;
  return rows * columns / pattern.group * (pattern.group - pattern.keep);
}

at::Tensor BlockWork::take_gram(int64_t input) {
  at::Tensor& gram = statistics[static_cast<size_t>(input)].gram;
  if (keep_statistics) return gram.clone();
  at::Tensor taken;
  std::swap(taken, gram);
  return taken;
}

std::vector<double> PruningMethod::head_scores(const HeadWork&) const {
  throw DefectError("a pruning method that removes no heads was asked for their scores");
}

MethodRegistration::MethodRegistration(const std::string& name, MethodFactory factory,
                                       std::vector<std::string> own_keys) {
  if (!registry().emplace(name, Entry{std::move(factory), std::move(own_keys)}).second)
    throw DefectError(fmt::format("two pruning methods are called {}", name));
}

std::vector<std::string> method_names() {
  std::vector<std::string> names;
  for (const auto& [name, entry] : registry()) names.push_back(name);
  return names;
}

std::unique_ptr<PruningMethod> make_method(const config::Section& section) {
  const std::string name = section.choice("method", method_names());
  const bool heads = section.text_or("pattern", "") == "heads";
  if (heads && !registry().at(name).reads("heads"))
    section.fail("pattern",
                 fmt::format("heads: method {} removes weights, not heads; choose method "
                             "dsee, or pattern unstructured or K:M",
                             name));
  refuse_keys_of_others(section, name);
  return registry().at(name).factory(section);
}

}  // namespace espalier::prune
