/// The `prune` stage: blocks in order; calibration sequences through a block, its inputs'
/// statistics, its matrices pruned over ranks and workers, the sequences through the pruned block.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "pipeline/data/token_set.h"
#include "pipeline/driver/spread.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/sequence_head.h"
#include "pipeline/model/stored_layers.h"
#include "stages/prune/block_files.h"
#include "stages/prune/calibration.h"
#include "stages/prune/conjugate_gradients.h"
#include "stages/prune/dense_pass.h"
#include "stages/prune/dsnot.h"
#include "stages/prune/head_removal.h"
#include "stages/prune/method.h"
#include "stages/prune/options.h"
#include "stages/prune/plan.h"

namespace espalier::prune {
namespace {

/// Part of the stage's key: another one where the same settings give other masks or weights.
constexpr const char* kNumericsVersion = "prune 2";

class PruneStage : public driver::Stage {
 public:
  explicit PruneStage(const config::Section& section)
      : method_name_(section.text_or("method", "")),
        method_(make_method(section)),
        options_(read_options(section)) {
    for (const Pattern& pattern : options_.patterns()) method_->check(pattern);
  }
  void check(const driver::RunContext& run,
             const std::filesystem::path& start_model) const override;
  driver::StageResult carry_out(driver::StageContext& context) const override;
  driver::StagePlan plan(const driver::RunContext& run,
                         const std::filesystem::path& start_model) const override {
    const io::Checkpoint checkpoint = io::Checkpoint::open(start_model);
    const model::Architecture architecture = model::read_architecture(checkpoint);
    driver::StagePlan plan = plan_of(method_name_, *method_, options_, architecture,
                                     pooler_in(checkpoint, architecture));
    if (needs_calibration())
      plan.lines.push_back(fmt::format("calibration: {} sequences of {} tokens of {}",
                                       options_.samples, options_.sequence_length,
                                       run.calibration_data.string()));
    return plan;
  }
  std::string checksum_of_inputs() const override { return kNumericsVersion; }
  std::vector<std::filesystem::path> token_sets(const driver::RunContext& run) const override {
    if (!needs_calibration()) return {};
    return {run.calibration_data};
  }

 private:
  bool keeps_dense() const { return options_.refit || options_.refine.dsnot; }
  /// Of the pass that prunes.
  Needs needs() const {
    Needs all = method_->needs() | Needs{.gram = options_.refit,
                                         .norms = options_.refine.dsnot,
                                         .moments = options_.refine.dsnot};
    if (keeps_dense()) all.bytes_per_weight += sizeof(float);
    return all;
  }
  bool needs_calibration() const { return needs().any() || options_.allocation.owl; }
  void check_data(const driver::RunContext& run, const model::Architecture& architecture,
                  const std::filesystem::path& start) const;
  void prune_block(driver::StageContext& context, const model::Architecture& architecture,
                   model::BlockWeights& block, int64_t index, Calibration* calibration,
                   const BlockAllocation* allocation, const BlockFiles& files) const;
  void prune_and_refine(BlockWork& work, const std::vector<PlannedLayer>& layers) const;
  ModelWork model_work(driver::StageContext& context, const io::Checkpoint& checkpoint,
                       const model::Architecture& architecture,
                       const std::optional<std::string>& pooler, const BlockFiles& files) const;
  void prune_pooler(driver::StageContext& context, const io::Checkpoint& checkpoint,
                    const model::Architecture& architecture, const std::string& weight,
                    const BlockFiles& files) const;
  /// The weight of the pooling layer, where the method prunes it; whether or not `layers` does.
  std::optional<std::string> pooler_in(const io::Checkpoint& checkpoint,
                                       const model::Architecture& architecture) const;
  driver::StageResult without_heads(driver::StageContext& context, const io::Checkpoint& checkpoint,
                                    const model::Architecture& architecture) const;
  nlohmann::json metrics(const BlockFiles& files, int64_t units) const;

  std::string method_name_;
  std::unique_ptr<PruningMethod> method_;
  Options options_;
};

void PruneStage::check(const driver::RunContext& run, const std::filesystem::path& start) const {
  const io::Checkpoint checkpoint = io::Checkpoint::open(start);
  const model::Architecture architecture = model::read_architecture(checkpoint);
  require_layers(options_.layers, architecture, pooler_in(checkpoint, architecture));
  if (const int64_t heads = options_.layers.pattern.heads; heads > 0)
    require_heads(architecture, heads);
  method_->check_start(options_.layers.pattern, run, checkpoint);
  int64_t weights = 0;
  for (int64_t block = 0; block < architecture.blocks; ++block)
    for (const PlannedLayer& layer : planned_layers(options_.layers, architecture, block))
      weights += layer.linear.out * layer.linear.in;
  const int64_t bytes = weights * static_cast<int64_t>(c10::elementSize(run.dtype));
  if (run.group.is_root()) io::require_space(run.directory, bytes + bytes / 8);
  if (needs_calibration()) check_data(run, architecture, start);
}

void PruneStage::check_data(const driver::RunContext& run, const model::Architecture& architecture,
                            const std::filesystem::path& start) const {
  if (run.calibration_data.empty())
    throw UserError("prune needs data.calibration: an HDF5 file made by launch/prepare_data.py");
  const data::TokenSet set = data::TokenSet::open(run.calibration_data);
  set.require_vocabulary(architecture.vocabulary, start.string());
  set.require_stream(options_.sequence_length);
  model::require_positions(architecture, options_.sequence_length, "prune.sequence_length",
                           start.string());
  if (options_.masked_tokens && !set.has_loss_mask())
    throw UserError(fmt::format("prune.tokens: loss_mask, and {} has none; set it to all",
                                run.calibration_data.string()));
}

/// By Input: the Grams that the refit solves with.
std::vector<SolverGram> solver_grams(BlockWork& work, double damping) {
  std::vector<SolverGram> grams(work.statistics.size());
  work.workers().for_each(static_cast<int64_t>(grams.size()), [&](int64_t i, int) {
    c10::InferenceMode guard;
    at::Tensor& gram = work.statistics[i].gram;
    if (gram.defined())
      grams[i] =
          solver_gram(scale_gram(gram, damping, fmt::format("block {} input {}", work.block, i)));
    gram = at::Tensor();
  });
  return grams;
}

bool is_feed_forward(const model::Linear& linear) {
  return linear.input == model::kFeedForwardInput || linear.input == model::kFeedForwardMiddle;
}

/// The method's masks and weights; then masks refined, then weights solved for once more.
void PruneStage::prune_and_refine(BlockWork& work, const std::vector<PlannedLayer>& layers) const {
  std::vector<at::Tensor> dense;
  if (keeps_dense())
    for (const MatrixTask& task : work.tasks) dense.push_back(task.weight.clone());
  work.keep_statistics = options_.refit;
  method_->prune(work);
  if (options_.refine.dsnot) {
    std::vector<uint8_t> refined;
    for (const PlannedLayer& layer : layers)
      refined.push_back(!options_.refine.skip_mlp || !is_feed_forward(layer.linear));
    work.report["swapped"] = refine_by_dsnot(work.tasks, refined, dense, work.statistics,
                                             options_.refine, work.workers(), work.group());
  }
  if (options_.refit)
    refit(work.tasks, dense, solver_grams(work, options_.damping), options_.refit_steps,
          work.workers(), work.group());
}

std::vector<MatrixTask> tasks_of(const model::Architecture& architecture,
                                 const model::BlockWeights& block, int64_t index,
                                 const std::vector<PlannedLayer>& layers) {
  std::vector<MatrixTask> tasks;
  for (const PlannedLayer& layer : layers) {
    const model::Linear& linear = layer.linear;
    const at::Tensor weight = block.weight[linear.role].to(at::kFloat, false, /*copy=*/true);
    tasks.push_back({architecture.weight_name(index, linear), weight, linear.input,
                     at::zeros(weight.sizes(), at::kByte), layer.pattern});
  }
  return tasks;
}

MatrixTask pooler_task(const io::Checkpoint& checkpoint, const std::string& name,
                       const Pattern& pattern) {
  const at::Tensor weight = checkpoint.view(name).to(at::kFloat, false, /*copy=*/true);
  checkpoint.drop(name);
  return {name, weight, 0, at::zeros(weight.sizes(), at::kByte), pattern};
}

std::optional<std::string> PruneStage::pooler_in(const io::Checkpoint& checkpoint,
                                                 const model::Architecture& architecture) const {
  if (!method_->prunes_pooler()) return std::nullopt;
  return model::pooler_weight(checkpoint, architecture);
}

ModelWork PruneStage::model_work(driver::StageContext& context, const io::Checkpoint& checkpoint,
                                 const model::Architecture& architecture,
                                 const std::optional<std::string>& pooler,
                                 const BlockFiles& files) const {
  ModelWork work{context,
                 checkpoint,
                 {},
                 {},
                 options_.layers.pattern,
                 options_.keep_zeros,
                 files.state_file("model.json")};
  for (int64_t block = 0; block < architecture.blocks; ++block)
    work.sizes.push_back(
        static_cast<int64_t>(planned_layers(options_.layers, architecture, block).size()));
  if (pooler) work.sizes.push_back(1);
  work.tasks = [&, pooler](int64_t unit) -> std::vector<MatrixTask> {
    c10::InferenceMode guard;
    if (unit == architecture.blocks)
      return {pooler_task(checkpoint, *pooler, options_.layers.pattern)};
    return tasks_of(architecture,
                    model::load_block(checkpoint, architecture, unit, context.run.dtype), unit,
                    planned_layers(options_.layers, architecture, unit));
  };
  return work;
}

void PruneStage::prune_pooler(driver::StageContext& context, const io::Checkpoint& checkpoint,
                              const model::Architecture& architecture, const std::string& weight,
                              const BlockFiles& files) const {
  c10::InferenceMode guard;
  BlockWork work{context, architecture, architecture.blocks, {}, {}, options_.keep_zeros};
  work.tasks.push_back(pooler_task(checkpoint, weight, options_.layers.pattern));
  method_->prune(work);
  gather_rows(work.tasks, method_->moves_weights(), context.run.group);
  if (context.run.group.is_root())
    files.write(architecture.blocks, work.tasks, checkpoint.info(weight).dtype, work.report);
}

void PruneStage::prune_block(driver::StageContext& context, const model::Architecture& architecture,
                             model::BlockWeights& block, int64_t index, Calibration* calibration,
                             const BlockAllocation* allocation, const BlockFiles& files) const {
  const driver::RunContext& run = context.run;
  auto layers = planned_layers(options_.layers, architecture, index);
  BlockWork work{context, architecture, index, {}, {}, options_.keep_zeros};
  if (allocation != nullptr) {
    for (PlannedLayer& layer : layers)
      if (!layer.overridden) layer.pattern.sparsity = allocation->sparsity;
    work.report["outlier_ratio"] = allocation->outlier_ratio;
    work.report["sparsity"] = allocation->sparsity;
  }
  if (calibration != nullptr)
    work.statistics = calibration->collect(
        block, index, layers, [&](const std::string& line) { context.progress.say(line); });
  c10::InferenceMode guard;
  work.tasks = tasks_of(architecture, block, index, layers);
  prune_and_refine(work, layers);
  gather_rows(work.tasks, method_->moves_weights() || options_.refit, run.group);
  for (size_t i = 0; i < layers.size(); ++i)
    block.weight[layers[i].linear.role] = work.tasks[i].weight.to(run.dtype);
  if (run.group.is_root()) files.write(index, work.tasks, run.dtype, work.report);
}

/// The block as an earlier start of this run left it.
void restore_block(const BlockFiles& files, const model::Architecture& architecture, int64_t index,
                   model::BlockWeights& block) {
  const io::SafetensorsFile file(files.weights_file(index));
  for (const auto& of_all : architecture.linears) {
    const model::Linear linear = architecture.in_block(index, of_all);
    const std::string name = model::stored_weight_name(architecture, index, linear);
    if (file.tensors().contains(name))
      block.weight[linear.role] = model::layer_part(architecture, linear, file.view(name))
                                      .clone(at::MemoryFormat::Contiguous);
  }
}

driver::StageResult PruneStage::carry_out(driver::StageContext& context) const {
  const driver::RunContext& run = context.run;
  const io::Checkpoint checkpoint = io::Checkpoint::open(context.input_model);
  const model::Architecture architecture = model::read_architecture(checkpoint);
  if (options_.layers.pattern.heads > 0) return without_heads(context, checkpoint, architecture);
  const BlockFiles files(context, architecture, checkpoint);
  std::optional<std::string> pooler = pooler_in(checkpoint, architecture);
  if (pooler && !chooses(options_.layers, *pooler)) pooler.reset();
  if (pooler && keeps_dense()) context.progress.say(kPoolerStays);
  const int64_t units = architecture.blocks + (pooler ? 1 : 0);
  const int64_t done = files.finished_blocks(run.group, units);
  method_->prepare(model_work(context, checkpoint, architecture, pooler, files));
  std::vector<BlockAllocation> allocation;
  if (options_.allocation.owl && done < architecture.blocks)
    allocation =
        allocate_by_owl(context, options_, architecture, checkpoint, files.state_file("owl.json"));
  context.progress.start("blocks", units, done);
  std::optional<Calibration> calibration;
  if (needs().any() && done < architecture.blocks)
    calibration.emplace(run, options_, architecture, checkpoint, needs(),
                        context.state_directory());
  if (calibration && calibration->spilled_bytes() > 0)
    context.progress.say(fmt::format("hidden states spill to disk: {:.3g} GiB a rank",
                                     double(calibration->spilled_bytes()) / (1 << 30)));
  for (int64_t index = calibration ? 0 : done; index < architecture.blocks; ++index) {
    model::BlockWeights block = model::load_block(checkpoint, architecture, index, run.dtype);
    if (index < done)
      restore_block(files, architecture, index, block);
    else
      prune_block(context, architecture, block, index, calibration ? &*calibration : nullptr,
                  allocation.empty() ? nullptr : &allocation[index], files);
    if (calibration && index + 1 < architecture.blocks) calibration->advance(block);
    context.progress.advance(std::max(done, index + 1));
    if (driver::stop_requested(run.group))
      throw Requeue(
          fmt::format("prune: stopped after block {} of {}", index + 1, architecture.blocks));
  }
  if (pooler && done < units) prune_pooler(context, checkpoint, architecture, *pooler, files);
  context.progress.advance(units);
  driver::StageResult result{files.model_directory(), {}};
  if (run.group.is_root()) result.metrics = metrics(files, units);
  driver::write_derived(files.model_directory(), checkpoint, run.group);
  context.progress.finish();
  return result;
}

driver::StageResult PruneStage::without_heads(driver::StageContext& context,
                                              const io::Checkpoint& checkpoint,
                                              const model::Architecture& architecture) const {
  driver::StageResult result{context.directory / "model", {}};
  const nlohmann::json removed =
      remove_heads(context, *method_, checkpoint, architecture, options_.layers.pattern.heads);
  context.progress.finish();
  if (!context.run.group.is_root()) return result;
  result.metrics = {{"method", method_name_}, {"pattern", options_.layers.pattern.name()}};
  result.metrics.update(method_->facts());
  result.metrics.update(removed);
  return result;
}

/// Share of zeros over all pruned matrices.
double sparsity_of(const nlohmann::json& matrices) {
  int64_t zeros = 0, weights = 0;
  for (const nlohmann::json& matrix : matrices) {
    zeros += matrix["zeros"].get<int64_t>();
    weights += matrix["rows"].get<int64_t>() * matrix["columns"].get<int64_t>();
  }
  return weights == 0 ? 0 : static_cast<double>(zeros) / static_cast<double>(weights);
}

nlohmann::json PruneStage::metrics(const BlockFiles& files, int64_t units) const {
  const nlohmann::json matrices = files.assemble_masks(units);
  nlohmann::json metrics = {{"method", method_name_},
                            {"pattern", options_.layers.pattern.name()},
                            {"sparsity", sparsity_of(matrices)},
                            {"sparsity_asked", options_.layers.pattern.sparsity},
                            {"allocation", options_.allocation.owl ? "owl" : "uniform"},
                            {"refine", options_.refine.dsnot ? "dsnot" : "none"},
                            {"refit", options_.refit},
                            {"matrices", matrices}};
  if (needs_calibration())
    metrics.update({{"samples", options_.samples}, {"sequence_length", options_.sequence_length}});
  metrics.update(method_->facts());
  const std::vector<nlohmann::json> reports = files.reports(units);
  double damping = 0;
  bool any = false;
  for (const nlohmann::json& report : reports) {
    damping = std::max(damping, report.value("damping", 0.0));
    any = any || !report.empty();
  }
  if (any) metrics["blocks"] = reports;
  if (damping > 0) metrics["damping"] = damping;  // the largest: what a reader asks first
  return metrics;
}

const driver::StageRegistration registration{
    "prune", [](const config::Section& section) -> std::unique_ptr<driver::Stage> {
      return std::make_unique<PruneStage>(section);
    }};

}  // namespace
}  // namespace espalier::prune
