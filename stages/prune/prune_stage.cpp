/// The `prune` stage: blocks in order; calibration sequences through a block, its inputs'
/// statistics, its matrices pruned over ranks and workers, the sequences through the pruned block.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "pipeline/data/token_set.h"
#include "pipeline/driver/spread.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/linalg/factor.h"
#include "stages/prune/block_files.h"
#include "stages/prune/calibration.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/options.h"

namespace espalier::prune {
namespace {

/// Factors of the block's distinct inputs; every rank ends with all of them.
struct Factors {
  std::vector<at::Tensor> factor = std::vector<at::Tensor>(model::kInputs);
  std::vector<std::vector<int64_t>> dead = std::vector<std::vector<int64_t>>(model::kInputs);
  double largest_damping = 0;
};

class PruneStage : public driver::Stage {
 public:
  explicit PruneStage(const config::Section& section) : options_(read_options(section)) {}
  void check(const driver::RunContext& run,
             const std::filesystem::path& start_model) const override;
  driver::StageResult carry_out(driver::StageContext& context) const override;
  std::vector<std::filesystem::path> token_sets(const driver::RunContext& run) const override {
    if (!options_.needs_calibration()) return {};
    return {run.calibration_data};
  }

 private:
  void prune_block(driver::StageContext& context, const model::Architecture& architecture,
                   model::BlockWeights& block, int64_t index, Calibration* calibration,
                   const BlockFiles& files) const;
  Factors factor(driver::StageContext& context, int64_t block,
                 std::array<InputStatistics, model::kInputs>& statistics) const;

  Options options_;
};

void PruneStage::check(const driver::RunContext& run, const std::filesystem::path& start) const {
  const io::Checkpoint checkpoint = io::Checkpoint::open(start);
  const model::Architecture architecture = model::read_architecture(checkpoint);
  require_layers(options_, architecture);
  int64_t bytes = 0;
  for (const model::Linear* layer : chosen_layers(options_, architecture, 0))
    bytes += layer->out * layer->in * architecture.blocks *
             static_cast<int64_t>(c10::elementSize(run.dtype));
  if (run.group.is_root()) io::require_space(run.directory, bytes + bytes / 8);
  if (!options_.needs_calibration()) return;
  if (run.calibration_data.empty())
    throw UserError("prune needs data.calibration: an HDF5 file made by launch/prepare_data.py");
  const data::TokenSet set = data::TokenSet::open(run.calibration_data);
  set.require_vocabulary(architecture.vocabulary, start.string());
  set.require_stream(options_.sequence_length);
}

/// One input a rank, dearest first; the rank's workers share its inputs.
Factors PruneStage::factor(driver::StageContext& context, int64_t block,
                           std::array<InputStatistics, model::kInputs>& statistics) const {
  const driver::RunContext& run = context.run;
  std::vector<int> order;
  for (int input = 0; input < model::kInputs; ++input)
    if (statistics[input].gram.defined()) order.push_back(input);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) {
    return statistics[a].gram.size(0) > statistics[b].gram.size(0);
  });
  // Longest first onto the rank with the least work, by the cube of the size.
  std::vector<double> load(static_cast<size_t>(run.group.size()));
  std::vector<int> owner(model::kInputs, -1), mine;
  for (int input : order) {
    owner[input] = static_cast<int>(std::min_element(load.begin(), load.end()) - load.begin());
    load[owner[input]] += std::pow(static_cast<double>(statistics[input].gram.size(0)), 3);
    if (owner[input] == run.group.rank()) mine.push_back(input);
  }
  Factors factors;
  std::vector<linalg::FactorReport> reports(model::kInputs);
  run.workers->for_each(static_cast<int64_t>(mine.size()), [&](int64_t i, int) {
    c10::InferenceMode guard;
    const int input = mine[i];
    factors.factor[input] =
        linalg::inverse_factor(statistics[input].gram, options_.damping,
                               fmt::format("block {} input {}", block, input), reports[input]);
  });
  for (int input : order) {
    const int64_t n = statistics[input].gram.size(0);
    if (!factors.factor[input].defined()) factors.factor[input] = at::empty({n, n});
    run.group.broadcast(comm::bytes_of(std::span(factors.factor[input].data_ptr<float>(),
                                                 static_cast<size_t>(n * n))),
                        owner[input]);
    nlohmann::json report = {{"damping", reports[input].damping},
                             {"raised", reports[input].times_raised},
                             {"dead", reports[input].dead_inputs}};
    report = nlohmann::json::parse(run.group.broadcast(report.dump(), owner[input]));
    factors.dead[input] = report["dead"].get<std::vector<int64_t>>();
    factors.largest_damping = std::max(factors.largest_damping, report["damping"].get<double>());
    if (report["raised"].get<int>() > 0)
      context.progress.say(
          fmt::format("block {}: damping raised to {} for input {}, its Gram is not "
                      "positive definite with less",
                      block, report["damping"].get<double>(), input));
    statistics[input].gram = at::Tensor();
  }
  return factors;
}

void PruneStage::prune_block(driver::StageContext& context, const model::Architecture& architecture,
                             model::BlockWeights& block, int64_t index, Calibration* calibration,
                             const BlockFiles& files) const {
  const driver::RunContext& run = context.run;
  const auto layers = chosen_layers(options_, architecture, index);
  std::array<InputStatistics, model::kInputs> statistics;
  if (calibration != nullptr)
    statistics = calibration->collect(block, index, layers,
                                      [&](const std::string& line) { context.progress.say(line); });
  c10::InferenceMode guard;
  double damping = 0;
  std::vector<MatrixTask> tasks;
  for (const model::Linear* layer : layers) {
    const at::Tensor weight = block.weight[layer->role].to(at::kFloat, false, /*copy=*/true);
    tasks.push_back({architecture.weight_name(index, *layer), weight, layer->input,
                     at::zeros(weight.sizes(), at::kByte)});
  }
  if (options_.method == Method::magnitude) {
    prune_magnitude(tasks, options_.pattern, options_.keep_zeros, *run.workers, run.group);
  } else if (options_.method == Method::wanda) {
    std::vector<std::vector<float>> norms;
    for (auto& input : statistics) norms.push_back(std::move(input.norms));
    prune_wanda(tasks, norms, options_.pattern, options_.keep_zeros, *run.workers, run.group);
  } else {
    const Factors factors = factor(context, index, statistics);
    damping = factors.largest_damping;
    prune_sparsegpt(tasks, factors.factor, factors.dead, options_.pattern, options_.block_size,
                    options_.keep_zeros, *run.workers, run.group);
  }
  gather_rows(tasks, options_.method == Method::sparsegpt, run.group);
  for (size_t i = 0; i < layers.size(); ++i)
    block.weight[layers[i]->role] = tasks[i].weight.to(run.dtype);
  if (run.group.is_root()) files.write(index, tasks, run.dtype, damping);
}

/// The block as an earlier start of this run left it.
void restore_block(const BlockFiles& files, const model::Architecture& architecture, int64_t index,
                   model::BlockWeights& block) {
  const io::SafetensorsFile file(files.weights_file(index));
  for (const auto& linear : architecture.linears) {
    const std::string name = architecture.weight_name(index, linear);
    if (file.tensors().contains(name)) block.weight[linear.role] = file.view(name).clone();
  }
}

driver::StageResult PruneStage::carry_out(driver::StageContext& context) const {
  const driver::RunContext& run = context.run;
  const io::Checkpoint checkpoint = io::Checkpoint::open(context.input_model);
  const model::Architecture architecture = model::read_architecture(checkpoint);
  const BlockFiles files(context);
  const int64_t done = files.finished_blocks(run.group, architecture.blocks);
  context.progress.start("blocks", architecture.blocks, done);
  std::optional<Calibration> calibration;
  if (options_.needs_calibration() && done < architecture.blocks)
    calibration.emplace(run, options_, architecture, checkpoint, context.state_directory());
  if (calibration && calibration->spilled_bytes() > 0)
    context.progress.say(fmt::format("hidden states spill to disk: {:.3g} GiB a rank",
                                     double(calibration->spilled_bytes()) / (1 << 30)));
  for (int64_t index = calibration ? 0 : done; index < architecture.blocks; ++index) {
    model::BlockWeights block = model::load_block(checkpoint, architecture, index, run.dtype);
    if (index < done)
      restore_block(files, architecture, index, block);
    else
      prune_block(context, architecture, block, index, calibration ? &*calibration : nullptr,
                  files);
    if (calibration && index + 1 < architecture.blocks) calibration->advance(block);
    context.progress.advance(std::max(done, index + 1));
    if (driver::stop_requested(run.group))
      throw Requeue(
          fmt::format("prune: stopped after block {} of {}", index + 1, architecture.blocks));
  }
  driver::StageResult result{files.model_directory(), {}};
  if (run.group.is_root()) {
    result.metrics = {{"method", options_.method_name},
                      {"pattern", options_.pattern.name()},
                      {"sparsity", options_.pattern.sparsity},
                      {"samples", options_.samples},
                      {"sequence_length", options_.sequence_length},
                      {"matrices", files.assemble_masks(architecture.blocks)}};
    if (options_.method == Method::sparsegpt)
      result.metrics["damping"] = files.largest_damping(architecture.blocks);
  }
  driver::write_derived(files.model_directory(), checkpoint, run.group);
  context.progress.finish();
  return result;
}

const driver::StageRegistration registration{
    "prune", [](const config::Section& section) -> std::unique_ptr<driver::Stage> {
      return std::make_unique<PruneStage>(section);
    }};

}  // namespace
}  // namespace espalier::prune
