/// The `retrain` stage: trains the adapters of one method at the matrices of a frozen model, and
/// merges them.

#include <fmt/format.h>

#include "pipeline/data/sampler.h"
#include "pipeline/data/token_set.h"
#include "pipeline/driver/spread.h"
#include "pipeline/driver/stage.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checksum.h"
#include "pipeline/train/loop.h"
#include "stages/retrain/adapted_model.h"
#include "stages/retrain/merge.h"
#include "stages/retrain/options.h"

namespace espalier::retrain {

namespace {

/// Changes with the meaning of the numbers a training keeps or leaves.
constexpr const char* kNumericsVersion = "retrain 1";

class RetrainStage : public driver::Stage {
 public:
  explicit RetrainStage(const config::Section& section)
      : options_(read_options(section)),
        method_(make_adapter_method(options_.method, section)),
        configuration_(section.canonical()) {}

  void check(const driver::RunContext& run,
             const std::filesystem::path& start_model) const override;
  driver::StageResult carry_out(driver::StageContext& context) const override;
  std::vector<std::filesystem::path> token_sets(const driver::RunContext& run) const override {
    return {run.train_data};
  }

 private:
  data::TokenSet open_data(const driver::RunContext& run, const model::Architecture& architecture,
                           const std::filesystem::path& model) const;
  train::LoopOptions loop_options(const driver::StageContext& context, int64_t steps,
                                  const std::string& fingerprint) const;
  train::LoopResult train(driver::StageContext& context, AdaptedModel& model,
                          train::ParameterSet& parameters, const data::TrainingSampler& sampler,
                          const std::string& fingerprint) const;

  RetrainOptions options_;
  std::unique_ptr<AdapterMethod> method_;
  std::string configuration_;
};

model::Architecture causal_architecture(const io::Checkpoint& checkpoint) {
  model::Architecture architecture = model::read_architecture(checkpoint);
  if (architecture.task != model::Task::causal)
    throw UserError(
        fmt::format("{}: retrain predicts the next token, but a {} model is no causal "
                    "language model",
                    checkpoint.directory().string(), architecture.model_type));
  return architecture;
}

data::TokenSet RetrainStage::open_data(const driver::RunContext& run,
                                       const model::Architecture& architecture,
                                       const std::filesystem::path& model) const {
  if (run.train_data.empty())
    throw UserError("retrain needs data.train: an HDF5 file made by launch/prepare_data.py");
  data::TokenSet set = data::TokenSet::open(run.train_data);
  set.require_vocabulary(architecture.vocabulary, model.string());
  if (architecture.max_positions > 0 && options_.sequence_length > architecture.max_positions)
    throw UserError(fmt::format("retrain.sequence_length = {} is more than the {} positions of {}",
                                options_.sequence_length, architecture.max_positions,
                                model.string()));
  return set;
}

void RetrainStage::check(const driver::RunContext& run,
                         const std::filesystem::path& start_model) const {
  const io::Checkpoint checkpoint = io::Checkpoint::open(start_model);
  const model::Architecture architecture = causal_architecture(checkpoint);
  const data::TrainingSampler sampler(open_data(run, architecture, start_model), run.seed,
                                      options_.sequence_length, options_.train_on_prompt);
  train::make_schedule(options_.schedule, options_.total_steps(sampler.epoch_sequences()),
                       options_.warmup_steps, options_.warmup_ratio);
  int64_t weights = 0;
  for (const model::Linear* layer : matching_layers(architecture, options_.targets)) {
    method_->check(architecture.weight_name(0, *layer), layer->out, layer->in);
    weights += layer->out * layer->in * architecture.blocks;
  }
  if (run.group.is_root())
    io::require_space(run.directory, weights * static_cast<int64_t>(c10::elementSize(run.dtype)));
}

train::LoopOptions RetrainStage::loop_options(const driver::StageContext& context, int64_t steps,
                                              const std::string& fingerprint) const {
  train::LoopOptions loop;
  loop.steps = steps;
  loop.units = options_.units();
  loop.learning_rate = options_.learning_rate;
  loop.schedule =
      train::make_schedule(options_.schedule, steps, options_.warmup_steps, options_.warmup_ratio);
  loop.adamw = options_.adamw;
  loop.max_grad_norm = options_.max_grad_norm;
  loop.checkpoint_every = options_.checkpoint_every;
  loop.checkpoint_file = context.state_directory() / "step.h5";
  loop.fingerprint = fingerprint;
  return loop;
}

train::LoopResult RetrainStage::train(driver::StageContext& context, AdaptedModel& model,
                                      train::ParameterSet& parameters,
                                      const data::TrainingSampler& sampler,
                                      const std::string& fingerprint) const {
  const driver::RunContext& run = context.run;
  const int64_t steps = options_.total_steps(sampler.epoch_sequences());
  train::Problem problem;
  problem.parameters = &parameters;
  problem.prepare_step = [&] { model.adapter().prepare_step(*run.workers); };
  problem.unit = [&](int64_t step, int64_t unit, const train::GradientSink& sink) {
    const int64_t in_step = unit * options_.micro_batch_size;
    const int64_t first = step * options_.batch_size + in_step;
    const UnitKey key{run.seed, step, in_step, options_.micro_batch_size};
    return model.loss_and_gradients(sampler.batch(first, options_.micro_batch_size), key,
                                    options_.activation_checkpointing, sink);
  };
  train::LoopEvents events;
  events.started = [&](int64_t done) { context.progress.start("steps", steps, done); };
  events.step = [&](const train::StepReport& report) {
    context.progress.advance(report.step, fmt::format("loss {:.4f}, {:.0f} tokens/s", report.loss,
                                                      report.tokens_per_second));
    context.progress.metric({{"event", "step"},
                             {"step", report.step},
                             {"loss", report.loss},
                             {"learning_rate", report.learning_rate},
                             {"gradient_norm", report.gradient_norm},
                             {"tokens", report.tokens},
                             {"tokens_per_second", report.tokens_per_second}});
  };
  events.say = [&](const std::string& line) { context.progress.say(line); };
  events.stop_requested = [&] { return driver::stop_requested(run.group); };
  const train::LoopResult result = train::run_loop(loop_options(context, steps, fingerprint),
                                                   problem, events, *run.workers, run.group);
  context.progress.finish();
  return result;
}

driver::StageResult RetrainStage::carry_out(driver::StageContext& context) const {
  const driver::RunContext& run = context.run;
  const io::Checkpoint checkpoint = io::Checkpoint::open(context.input_model);
  const model::Architecture architecture = causal_architecture(checkpoint);
  const data::TokenSet set = open_data(run, architecture, context.input_model);
  const data::TrainingSampler sampler(set, run.seed, options_.sequence_length,
                                      options_.train_on_prompt);
  const std::string base_checksum = driver::tensors_checksum(checkpoint, run.group);
  const std::string fingerprint =
      io::checksum(fmt::format("{} {} {} {} {} {}", kNumericsVersion, configuration_,
                               set.checksum(), base_checksum, run.seed, c10::toString(run.dtype)));

  AdaptedModel model(checkpoint, architecture, run.dtype, *method_, options_.targets);
  const std::unique_ptr<train::ParameterSet> parameters = model.make_parameters(run.seed);
  const train::LoopResult trained = train(context, model, *parameters, sampler, fingerprint);

  if (run.group.is_root())
    write_adapters(context.directory / "adapters.h5", *parameters, options_.method, base_checksum);
  driver::StageResult result;
  result.model = context.directory / "model";
  const MergeReport merged = write_merged(result.model, checkpoint, model, model.adapter(),
                                          options_.merge == "masked", *run.workers, run.group);
  context.progress.say(fmt::format("merged: {} nonzeros before, {} after, {} zeros filled",
                                   merged.nonzeros_before, merged.nonzeros_after, merged.filled));
  const double seconds = trained.seconds;
  result.metrics = {
      {"method", options_.method},
      {"steps", trained.steps},
      {"tokens", trained.tokens},
      {"trainable_parameters", parameters->size()},
      {"nonzeros_before", merged.nonzeros_before},
      {"nonzeros_after", merged.nonzeros_after},
      {"zeros_filled", merged.filled},
      {"loss_first", trained.loss_first},
      {"loss_last", trained.loss_last},
      {"tokens_per_second", seconds > 0 ? static_cast<double>(trained.tokens) / seconds : 0.0},
      {"data_checksum", set.checksum()},
      {"sequence_length", options_.sequence_length}};
  return result;
}

const driver::StageRegistration registration{
    "retrain", [](const config::Section& section) -> std::unique_ptr<driver::Stage> {
      auto stage = std::make_unique<RetrainStage>(section);
      section.finish();
      return stage;
    }};

}  // namespace

}  // namespace espalier::retrain
