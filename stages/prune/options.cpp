#include "stages/prune/options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <fnmatch.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"

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

/// Keys of the pinned interface whose other values this version does not have.
void refuse_unsupported(const config::Section& section) {
  section.choice("allocation", {"uniform"});
  section.choice("refine", {"none"});
  section.choice("tokens", {"all"});
  if (section.flag_or("refit", false))
    section.fail("refit", "true is not supported in this version; set it to false");
  if (!section.items("overrides").empty())
    section.fail("overrides",
                 "settings by matrix are not supported in this version; use include "
                 "and exclude, or several prune entries");
  section.allow({"stage", "from", "heads", "criterion"});
}

bool glob_matches(const std::string& glob, const model::Architecture& architecture, int64_t block,
                  const model::Linear& layer) {
  const std::string last = layer.name.substr(layer.name.rfind('.') + 1);
  for (const std::string& name : {architecture.tensor_name(block, layer.name), layer.name, last})
    if (fnmatch(glob.c_str(), name.c_str(), 0) == 0) return true;
  return false;
}

void require_matches(const std::vector<std::string>& globs, const std::string& key,
                     const model::Architecture& architecture) {
  for (const auto& glob : globs) {
    bool matched = false;
    for (int64_t block = 0; block < architecture.blocks && !matched; ++block)
      for (const auto& layer : architecture.linears)
        matched = matched || glob_matches(glob, architecture, block, layer);
    if (!matched) {
      std::vector<std::string> names;
      for (const auto& layer : architecture.linears) names.push_back(layer.name);
      throw UserError(fmt::format("prune.{}: \"{}\" matches no linear layer; a block has {}", key,
                                  glob, fmt::join(names, ", ")));
    }
  }
}

}  // namespace

Options read_options(const config::Section& section) {
  Options options;
  options.method_name = section.choice("method", {"magnitude", "wanda", "sparsegpt"});
  options.method = options.method_name == "magnitude" ? Method::magnitude
                   : options.method_name == "wanda"   ? Method::wanda
                                                      : Method::sparsegpt;
  options.pattern = read_pattern(section);
  options.samples = section.integer_or("samples", 128, {.low = 1, .high = 1e6});
  options.sequence_length = section.integer_or("sequence_length", 2048, {.low = 1, .high = 1e6});
  options.unit = section.integer_or("unit", 1, {.low = 1, .high = 1e6});
  options.block_size = section.integer_or("block_size", 128, {.low = 1, .high = 65536});
  if (!options.pattern.unstructured() && options.block_size % options.pattern.group != 0)
    section.fail("block_size", fmt::format("{} is not a multiple of the {} columns of a group",
                                           options.block_size, options.pattern.group));
  options.damping = section.number_or("damping", 0.01, {.low = 0, .high = 100});
  options.keep_zeros = section.flag_or("keep_zeros", true);
  if (!section.is_null("include")) options.include = section.texts("include");
  if (!section.is_null("exclude")) options.exclude = section.texts("exclude");
  section.allow({"include", "exclude"});
  refuse_unsupported(section);
  return options;
}

std::vector<const model::Linear*> chosen_layers(const Options& options,
                                                const model::Architecture& architecture,
                                                int64_t block) {
  const auto any = [&](const std::vector<std::string>& globs, const model::Linear& layer) {
    return std::any_of(globs.begin(), globs.end(), [&](const std::string& glob) {
      return glob_matches(glob, architecture, block, layer);
    });
  };
  std::vector<const model::Linear*> layers;
  for (const auto& layer : architecture.linears)
    if ((options.include.empty() || any(options.include, layer)) && !any(options.exclude, layer))
      layers.push_back(&layer);
  return layers;
}

void require_layers(const Options& options, const model::Architecture& architecture) {
  require_matches(options.include, "include", architecture);
  require_matches(options.exclude, "exclude", architecture);
  if (options.pattern.unstructured()) return;
  for (const model::Linear* layer : chosen_layers(options, architecture, 0))
    if (layer->in % options.pattern.group != 0)
      throw UserError(fmt::format(
          "prune.pattern: {} does not divide the {} inputs of {}; exclude it or choose another "
          "pattern",
          options.pattern.name(), layer->in, layer->name));
}

}  // namespace espalier::prune
