#include "stages/prune/dense_pass.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/json.h"
#include "stages/prune/calibration.h"
#include "stages/prune/owl.h"

namespace espalier::prune {
namespace {

/// The layers of a block that share the pattern of the configuration.
std::vector<PlannedLayer> allocated_layers(const Options& options,
                                           const model::Architecture& architecture, int64_t block) {
  std::vector<PlannedLayer> layers = planned_layers(options.layers, architecture, block);
  std::erase_if(layers, [](const PlannedLayer& layer) { return layer.overridden; });
  return layers;
}

double ratio_of_block(driver::StageContext& context, const Options& options,
                      Calibration& calibration, const model::BlockWeights& block, int64_t index,
                      const std::vector<PlannedLayer>& layers) {
  const auto statistics = calibration.collect(
      block, index, layers, [&](const std::string& line) { context.progress.say(line); });
  std::vector<NormedMatrix> matrices;
  for (const PlannedLayer& layer : layers)
    matrices.push_back({block.weight[layer.linear.role].to(at::kFloat).contiguous(),
                        &statistics[layer.linear.input].norms});
  return outlier_ratio(matrices, options.allocation.outlier_factor, *context.run.workers);
}

std::vector<double> ratios_by_pass(driver::StageContext& context, const Options& options,
                                   const model::Architecture& architecture,
                                   const io::Checkpoint& checkpoint) {
  const driver::RunContext& run = context.run;
  std::vector<double> ratios;
  Calibration calibration(run, options, architecture, checkpoint, {.norms = true},
                          context.state_directory());
  context.progress.start("blocks for owl's ratios", architecture.blocks);
  for (int64_t index = 0; index < architecture.blocks; ++index) {
    const model::BlockWeights block = model::load_block(checkpoint, architecture, index, run.dtype);
    ratios.push_back(ratio_of_block(context, options, calibration, block, index,
                                    allocated_layers(options, architecture, index)));
    if (index + 1 < architecture.blocks) calibration.advance(block);
    context.progress.advance(index + 1);
    if (driver::stop_requested(run.group))
      throw Requeue("prune: stopped while owl's ratios were collected");
  }
  context.progress.finish();
  return ratios;
}

std::string text_of(const std::filesystem::path& file) {
  std::stringstream text;
  text << std::ifstream(file).rdbuf();
  return text.str();
}

std::vector<double> read_or_make_ratios(driver::StageContext& context, const Options& options,
                                        const model::Architecture& architecture,
                                        const io::Checkpoint& checkpoint,
                                        const std::filesystem::path& journal) {
  const comm::Communicator& group = context.run.group;
  const std::string kept =
      group.broadcast(group.is_root() && exists(journal) ? text_of(journal) : std::string());
  if (!kept.empty()) {
    const nlohmann::json ratios = io::parse_json(kept, journal.string());
    if (ratios.is_array() && ratios.size() == static_cast<size_t>(architecture.blocks) &&
        std::all_of(ratios.begin(), ratios.end(), [](const auto& r) { return r.is_number(); }))
      return ratios.get<std::vector<double>>();
    throw UserError(fmt::format("{}: not the ratios of {} blocks; remove it", journal.string(),
                                architecture.blocks));
  }
  const std::vector<double> ratios = ratios_by_pass(context, options, architecture, checkpoint);
  if (group.is_root()) io::write_file(journal, nlohmann::json(ratios).dump());
  return ratios;
}

}  // namespace

std::vector<BlockAllocation> allocate_by_owl(driver::StageContext& context, const Options& options,
                                             const model::Architecture& architecture,
                                             const io::Checkpoint& checkpoint,
                                             const std::filesystem::path& journal) {
  const std::vector<double> ratios =
      read_or_make_ratios(context, options, architecture, checkpoint, journal);
  std::vector<int64_t> parameters(ratios.size());
  for (int64_t index = 0; index < architecture.blocks; ++index)
    for (const PlannedLayer& layer : allocated_layers(options, architecture, index))
      parameters[index] += layer.linear.out * layer.linear.in;
  const std::vector<double> sparsities =
      owl_sparsities(ratios, parameters, options.layers.pattern.sparsity, options.allocation.span);
  double mean = 0, total = 0;
  for (size_t b = 0; b < ratios.size(); ++b) {
    mean += sparsities[b] * static_cast<double>(parameters[b]);
    total += static_cast<double>(parameters[b]);
  }
  mean = total > 0 ? mean / total : options.layers.pattern.sparsity;
  if (std::abs(mean - options.layers.pattern.sparsity) > 1e-6)
    context.progress.say(fmt::format(
        "owl: no block can lose more than all of it: the mean sparsity is {:.4f} where {} is "
        "asked; a lower prune.owl.span comes closer",
        mean, options.layers.pattern.sparsity));
  std::vector<BlockAllocation> blocks;
  for (size_t b = 0; b < ratios.size(); ++b) blocks.push_back({ratios[b], sparsities[b]});
  return blocks;
}

}  // namespace espalier::prune
