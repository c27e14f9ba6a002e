#include <fnmatch.h>

#include <algorithm>

#include "pipeline/config/compose.h"
#include "pipeline/config/override.h"
#include "pipeline/config/override_functions.h"
#include "pipeline/config/repository.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

constexpr size_t kMaximumMembers = 10000;

bool matches_any(const std::string& name, const std::vector<std::string>& patterns) {
  return std::any_of(patterns.begin(), patterns.end(), [&](const std::string& pattern) {
    return fnmatch(pattern.c_str(), name.c_str(), 0) == 0;
  });
}

std::vector<std::string> member_texts(const Sweep& sweep, const Override& override,
                                      const Repository& repository) {
  std::vector<std::string> texts;
  if (sweep.kind == Sweep::Kind::glob) {
    if (!repository.has_group(override.key))
      throw UserError("glob() takes its members from a group, and " + override.key + " is none");
    for (const auto& choice : repository.choices(override.key)) {
      if (matches_any(choice, sweep.include) && !matches_any(choice, sweep.exclude))
        texts.push_back(choice);
    }
  } else {
    for (const auto& value : sweep_members(sweep)) texts.push_back(value.written());
  }
  if (texts.empty()) throw UserError("the sweep has no members");
  return texts;
}

/// One override's members, each with its key: "prune=wanda", "prune=sparsegpt".
std::vector<std::string> members(const Override& override, const Repository& repository) {
  const Value& value = override.value;
  std::string key = override.prefixed_key();
  try {
    if (value.kind != Value::Kind::sweep) {
      std::string text = override.has_value ? value.written() : "null";
      return {key + "=" + text};
    }
    std::vector<std::string> texts = member_texts(*value.sweep, override, repository);
    for (auto& text : texts) text = key + "=" + text;
    return texts;
  } catch (const UserError& error) {
    throw UserError(override.origin().describe() + ": " + error.what());
  }
}

}  // namespace

std::vector<std::vector<std::string>> expand_sweep(const Request& request) {
  Repository repository(request.directory);
  std::vector<std::pair<std::string, std::vector<std::string>>> axes;
  for (const auto& text : request.overrides) {
    Override override = parse_override(text);
    std::string key = override.prefixed_key();
    auto same =
        std::find_if(axes.begin(), axes.end(), [&](const auto& axis) { return axis.first == key; });
    if (same == axes.end()) {
      axes.emplace_back(key, members(override, repository));
    } else {  // the last of one key counts, at the place of the first
      same->second = members(override, repository);
    }
  }
  size_t total = 1;
  for (const auto& axis : axes) {
    total *= axis.second.size();
    if (total > kMaximumMembers) {
      throw UserError("command line: the sweep has more than " + std::to_string(kMaximumMembers) +
                      " members; split it into several");
    }
  }
  std::vector<std::vector<std::string>> product = {{}};
  for (const auto& axis : axes) {
    std::vector<std::vector<std::string>> longer;
    for (const auto& member : product) {
      for (const auto& text : axis.second) {
        longer.push_back(member);
        longer.back().push_back(text);
      }
    }
    product.swap(longer);
  }
  return product;
}

}  // namespace espalier::config
