#include "stages/prune/options.h"

#include <fmt/format.h>

namespace espalier::prune {
namespace {

AllocationOptions read_allocation(const config::Section& section, const Pattern& pattern) {
  AllocationOptions options;
  options.owl = section.choice("allocation", {"uniform", "owl"}) == "owl";
  if (options.owl && !pattern.unstructured())
    section.fail("allocation",
                 fmt::format("owl gives every block a sparsity of its own, and pattern \"{}\" "
                             "fixes it; choose pattern unstructured or allocation uniform",
                             pattern.name()));
  if (section.is_null("owl")) return options;
  const config::Section own = section.child("owl");
  options.outlier_factor =
      own.number_or("outlier_factor", options.outlier_factor, {.low = 0, .low_open = true});
  options.span = own.number_or("span", options.span, {.low = 0, .high = 1});
  return options;
}

RefineOptions read_refine(const config::Section& section) {
  RefineOptions options;
  options.dsnot = section.choice("refine", {"none", "dsnot"}) == "dsnot";
  if (section.is_null("dsnot")) return options;
  const config::Section own = section.child("dsnot");
  options.cycles = own.integer_or("cycles", options.cycles, {.low = 1, .high = 1e6});
  options.threshold = own.number_or("threshold", options.threshold, {.low = 0});
  options.skip_mlp = own.choice("skip", {"none", "mlp"}) == "mlp";
  return options;
}

/// Whole heads go from every block: what chooses or changes single weights has no place.
void refuse_weights_only(const config::Section& section, const Options& options) {
  const auto refuse = [&](bool set, const char* key, const char* otherwise) {
    if (set)
      section.fail(key, fmt::format("pattern heads removes heads of every block, not weights of "
                                    "matrices; set it to {}",
                                    otherwise));
  };
  refuse(options.allocation.owl, "allocation", "uniform");
  refuse(options.refine.dsnot, "refine", "none");
  refuse(options.refit, "refit", "false");
  refuse(!options.layers.include.empty(), "include", "[]");
  refuse(!options.layers.exclude.empty(), "exclude", "[]");
  refuse(!options.layers.overrides.empty(), "overrides", "[]");
}

}  // namespace

std::vector<Pattern> Options::patterns() const {
  std::vector<Pattern> all = {layers.pattern};
  for (const Override& item : layers.overrides)
    if (item.pattern) all.push_back(*item.pattern);
  return all;
}

Options read_options(const config::Section& section) {
  Options options;
  options.layers = read_layer_choice(section);
  options.samples = section.integer_or("samples", 128, {.low = 1, .high = 1e6});
  options.sequence_length = section.integer_or("sequence_length", 2048, {.low = 1, .high = 1e6});
  options.unit = section.integer_or("unit", 1, {.low = 1, .high = 1e6});
  options.masked_tokens = section.choice("tokens", {"all", "loss_mask"}) == "loss_mask";
  options.keep_zeros = section.flag_or("keep_zeros", true);
  options.allocation = read_allocation(section, options.layers.pattern);
  options.refine = read_refine(section);
  options.refit = section.flag_or("refit", false);
  options.refit_steps = section.integer_or("refit_steps", 20, {.low = 1, .high = 10000});
  options.damping = section.number_or("damping", 0.01, {.low = 0, .high = 100});
  if (options.layers.pattern.heads > 0) refuse_weights_only(section, options);
  section.allow({"stage", "from"});
  return options;
}

}  // namespace espalier::prune
