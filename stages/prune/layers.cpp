#include "stages/prune/layers.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fnmatch.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/model/layer_glob.h"

namespace espalier::prune {
namespace {

Pattern read_pattern(const config::Section& section) {
  const std::string text = section.text_or("pattern", "unstructured");
  const auto sparsity =
      section.optional_number("sparsity", {.low = 0, .high = 1, .high_open = true});
  Pattern pattern;
  try {
    pattern = parse_pattern(text, sparsity.value_or(0.5));
  } catch (const UserError& error) {
    section.fail("pattern", error.what());
  }
  if (!pattern.unstructured() && sparsity && std::abs(*sparsity - pattern.sparsity) > 1e-9)
    section.fail("sparsity", fmt::format("{} contradicts pattern \"{}\", which removes {}; leave "
                                         "sparsity out (null) or choose pattern unstructured",
                                         *sparsity, text, pattern.sparsity));
  return pattern;
}

Pattern read_pattern_or_heads(const config::Section& section) {
  const auto heads = section.optional_integer("heads", {.low = 1, .high = 1e6});
  if (section.text_or("pattern", "") != "heads") {
    if (heads)
      section.fail("heads",
                   "is the number of heads that a block loses by pattern heads; set it to "
                   "null, or pattern to heads");
    return read_pattern(section);
  }
  if (!heads) section.fail("heads", "pattern heads needs the number of heads that a block loses");
  if (!section.is_null("sparsity"))
    section.fail("sparsity",
                 "pattern heads removes whole heads, and heads says how many; set it to "
                 "null");
  section.allow({"sparsity"});
  Pattern pattern;
  pattern.sparsity = 0;
  pattern.heads = *heads;
  return pattern;
}

Override read_override(const config::Section& section) {
  Override result{section.text("match"), {}};
  const bool skip = section.flag_or("skip", false);
  if (section.text_or("pattern", "") == "heads")
    section.fail("pattern", "heads go from every block alike; an override cannot name them");
  const bool has_pattern = !section.is_null("pattern") || !section.is_null("sparsity");
  if (skip == has_pattern)
    section.fail("match", fmt::format("\"{}\" needs either skip: true, or a pattern or sparsity",
                                      result.match));
  const Pattern pattern = read_pattern(section);
  if (!skip) result.pattern = pattern;
  return result;
}

/// A layer outside of the blocks, by its whole name or the last two parts.
bool glob_matches(const std::string& glob, const std::string& weight) {
  const std::string layer = weight.substr(0, weight.rfind(".weight"));
  const size_t dot = layer.rfind('.'), before = dot == 0 ? dot : layer.rfind('.', dot - 1);
  const std::string last = before == std::string::npos ? layer : layer.substr(before + 1);
  return fnmatch(glob.c_str(), layer.c_str(), 0) == 0 ||
         fnmatch(glob.c_str(), last.c_str(), 0) == 0;
}

void require_match(const std::string& glob, const std::string& key,
                   const model::Architecture& architecture,
                   const std::optional<std::string>& outside) {
  if (outside && glob_matches(glob, *outside)) return;
  for (int64_t block = 0; block < architecture.blocks; ++block)
    for (const auto& layer : architecture.linears)
      if (model::glob_matches(glob, architecture, block, layer)) return;
  std::vector<std::string> names;
  for (const auto& layer : architecture.linears) names.push_back(layer.name);
  throw UserError(fmt::format("prune.{}: \"{}\" matches no linear layer; a block has {}", key, glob,
                              fmt::join(names, ", ")));
}

}  // namespace

LayerChoice read_layer_choice(const config::Section& section) {
  LayerChoice choice;
  choice.pattern = read_pattern_or_heads(section);
  if (!section.is_null("include")) choice.include = section.texts("include");
  if (!section.is_null("exclude")) choice.exclude = section.texts("exclude");
  section.allow({"include", "exclude"});
  for (const config::Section& item : section.items("overrides"))
    choice.overrides.push_back(read_override(item));
  return choice;
}

std::vector<PlannedLayer> planned_layers(const LayerChoice& choice,
                                         const model::Architecture& architecture, int64_t block) {
  std::vector<PlannedLayer> layers;
  for (const auto& layer : architecture.linears) {
    const auto matches = [&](const std::string& glob) {
      return model::glob_matches(glob, architecture, block, layer);
    };
    const auto any = [&](const std::vector<std::string>& globs) {
      return std::any_of(globs.begin(), globs.end(), matches);
    };
    if ((!choice.include.empty() && !any(choice.include)) || any(choice.exclude)) continue;
    const auto first = std::find_if(choice.overrides.begin(), choice.overrides.end(),
                                    [&](const Override& item) { return matches(item.match); });
    if (first == choice.overrides.end())
      layers.push_back({architecture.in_block(block, layer), choice.pattern, false});
    else if (first->pattern)
      layers.push_back({architecture.in_block(block, layer), *first->pattern, true});
  }
  return layers;
}

bool chooses(const LayerChoice& choice, const std::string& weight) {
  const auto any = [&](const std::vector<std::string>& globs) {
    return std::any_of(globs.begin(), globs.end(),
                       [&](const std::string& glob) { return glob_matches(glob, weight); });
  };
  if ((!choice.include.empty() && !any(choice.include)) || any(choice.exclude)) return false;
  const auto first =
      std::find_if(choice.overrides.begin(), choice.overrides.end(),
                   [&](const Override& item) { return glob_matches(item.match, weight); });
  return first == choice.overrides.end() || first->pattern.has_value();
}

void require_layers(const LayerChoice& choice, const model::Architecture& architecture,
                    const std::optional<std::string>& outside) {
  for (const auto& glob : choice.include) require_match(glob, "include", architecture, outside);
  for (const auto& glob : choice.exclude) require_match(glob, "exclude", architecture, outside);
  for (const auto& item : choice.overrides)
    require_match(item.match, "overrides", architecture, outside);
  for (int64_t block = 0; block < architecture.blocks; ++block)
    for (const PlannedLayer& layer : planned_layers(choice, architecture, block))
      if (!layer.pattern.unstructured() && layer.linear.in % layer.pattern.group != 0)
        throw UserError(fmt::format(
            "prune.pattern: {} does not divide the {} inputs of {}; exclude it or choose another "
            "pattern",
            layer.pattern.name(), layer.linear.in, layer.linear.name));
}

}  // namespace espalier::prune
