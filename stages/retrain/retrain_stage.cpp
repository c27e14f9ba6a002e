/// The `retrain` stage: trains what one method adds to a frozen model, and merges it or leaves it
/// beside.

#include <c10/util/accumulate.h>
#include <fmt/format.h>

#include <algorithm>

#include "pipeline/data/token_set.h"
#include "pipeline/driver/spread.h"
#include "pipeline/driver/stage.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checksum.h"
#include "pipeline/train/loop.h"
#include "stages/retrain/adapted_model.h"
#include "stages/retrain/adapter_file.h"
#include "stages/retrain/difference.h"
#include "stages/retrain/merge.h"
#include "stages/retrain/options.h"
#include "stages/retrain/plan.h"
#include "stages/retrain/start.h"
#include "stages/retrain/training_data.h"
#include "stages/retrain/validation.h"

namespace espalier::retrain {

namespace {

/// Changes with the meaning of the numbers a training keeps or leaves.
constexpr const char* kNumericsVersion = "retrain 3";
/// Where the merged model is compared with the trained one.
constexpr int64_t kComparedSequences = 4, kComparedTokens = 128;
constexpr const char* kNothingValidated = "nothing is validated: the last step is kept";

int64_t bytes_below(const std::filesystem::path& directory) {
  std::error_code error;  // a file that goes meanwhile counts nothing
  int64_t bytes = 0;
  for (std::filesystem::recursive_directory_iterator entry(directory, error), end; entry != end;
       entry.increment(error))
    if (entry->is_regular_file(error)) bytes += static_cast<int64_t>(entry->file_size(error));
  return bytes;
}

/// The sets of a run, opened.
struct Sets {
  TrainingData train;
  std::optional<Validation> validation;
  std::string checksum;
};

class RetrainStage : public driver::Stage {
 public:
  explicit RetrainStage(const config::Section& section)
      : options_(read_options(section)),
        method_(make_adapter_method(options_.method, section)),
        configuration_(section.canonical()) {
    if (options_.merge == Merge::beside && !method_->additive())
      section.fail("merge",
                   fmt::format("beside: what {} does to a matrix is no sum that could stay "
                               "next to it; take masked or dense",
                               options_.method));
  }

  void check(const driver::RunContext& run,
             const std::filesystem::path& start_model) const override;
  driver::StageResult carry_out(driver::StageContext& context) const override;
  driver::StagePlan plan(const driver::RunContext& run,
                         const std::filesystem::path& start_model) const override;
  std::string checksum_of_inputs() const override;
  std::vector<std::filesystem::path> token_sets(const driver::RunContext& run) const override {
    if (options_.validate.data) return {run.train_data, *options_.validate.data};
    return {run.train_data};
  }

 private:
  /// What the method will train, the head's parameters in `head_parameters`.
  Selection trained(const driver::RunContext& run, const io::Checkpoint& checkpoint,
                    const model::Architecture& architecture, const TrainingData& data,
                    int64_t* head_parameters = nullptr) const;
  Sets open_sets(const driver::RunContext& run, const model::Architecture& architecture,
                 const std::filesystem::path& model) const;
  void check_start(const driver::RunContext& run, const io::Checkpoint& start_model) const;
  int64_t bytes_on_disk(const Selection& selection, int64_t head, at::ScalarType dtype) const;
  ModelOptions model_options(const driver::StageContext& context, const io::Checkpoint& checkpoint,
                             const model::Architecture& architecture, const TrainingData& data,
                             const Start& start) const;
  train::LoopOptions loop_options(const driver::StageContext& context, const Sets& sets,
                                  const std::string& fingerprint) const;
  train::LoopResult train(driver::StageContext& context, AdaptedModel& model,
                          train::ParameterSet& parameters, const Sets& sets,
                          const std::string& fingerprint) const;
  double validate(driver::StageContext& context, const AdaptedModel& model,
                  const Validation& validation, int64_t steps) const;
  Difference compare(driver::StageContext& context, const AdaptedModel& model,
                     const TrainingData& data, const std::filesystem::path& written) const;
  void say_merged(driver::StageContext& context, const MergeReport& merged) const;

  RetrainOptions options_;
  std::unique_ptr<AdapterMethod> method_;
  std::string configuration_;
};

std::string merge_name(Merge merge) {
  if (merge == Merge::beside) return "beside";
  return merge == Merge::masked ? "masked" : "dense";
}

/// Applying a stored adapter takes no steps, and no warm-up is too long for that.
train::Schedule schedule_of(const RetrainOptions& options, int64_t steps) {
  if (steps == 0) return {};
  return train::make_schedule(options.schedule, steps, options.warmup_steps, options.warmup_ratio);
}

data::TokenSet open_set(const std::filesystem::path& file, const model::Architecture& architecture,
                        const std::filesystem::path& model) {
  data::TokenSet set = data::TokenSet::open(file);
  set.require_vocabulary(architecture.vocabulary, model.string());
  return set;
}

Sets RetrainStage::open_sets(const driver::RunContext& run, const model::Architecture& architecture,
                             const std::filesystem::path& model) const {
  if (run.train_data.empty())
    throw UserError("retrain needs data.train: an HDF5 file made by launch/prepare_data.py");
  model::require_positions(architecture, options_.sequence_length, "retrain.sequence_length",
                           model.string());
  const data::TokenSet set = open_set(run.train_data, architecture, model);
  if (architecture.task != model::Task::causal && !set.is_classification())
    throw UserError(
        fmt::format("{}: retrain predicts the next token, but {} is no causal language "
                    "model; give data.train labelled rows (prepare_data.py --format "
                    "glue)",
                    set.path().string(), architecture.model_type));
  if (options_.head_learning_rate && !set.is_classification())
    throw UserError(
        fmt::format("retrain.head_learning_rate: {} has no labels, so no head of its "
                    "own is trained; set it to null",
                    set.path().string()));
  const auto data = [&](const data::TokenSet& of, data::HeldOut part) {
    return TrainingData(of, run.seed, options_.sequence_length, options_.train_on_prompt, part);
  };
  const ValidateOptions& validate = options_.validate;
  const double share = validate.share.value_or(0);
  Sets sets{data(set, {share, false}), std::nullopt, set.checksum()};
  if (validate.share) sets.validation.emplace(data(set, {share, true}), validate.metric);
  if (!validate.data) return sets;
  const data::TokenSet held = open_set(*validate.data, architecture, model);
  if (held.is_classification() != set.is_classification() ||
      (held.is_classification() &&
       (held.classes() != set.classes() || held.label_names() != set.label_names())))
    throw UserError(fmt::format("retrain.validate.data: {} is of another task than {}",
                                held.path().string(), set.path().string()));
  sets.validation.emplace(data(held, {1.0, true}), validate.metric);
  sets.checksum += " " + held.checksum();
  return sets;
}

Selection RetrainStage::trained(const driver::RunContext& run, const io::Checkpoint& checkpoint,
                                const model::Architecture& architecture, const TrainingData& data,
                                int64_t* head_parameters) const {
  std::vector<std::string> head;
  if (data.labelled())
    for (const model::HeadTensor& tensor :
         model::load_sequence_head(checkpoint, architecture, data.logits(), run.seed, true,
                                   data.set().label_names())
             .tensors) {
      head.push_back(tensor.name);
      if (head_parameters != nullptr) *head_parameters += tensor.value.numel();
    }
  return select(checkpoint, architecture, *method_, options_.targets, head);
}

void RetrainStage::check(const driver::RunContext& run,
                         const std::filesystem::path& start_model) const {
  const io::Checkpoint checkpoint = io::Checkpoint::open(start_model);
  const model::Architecture architecture = model::read_architecture(checkpoint);
  const Sets sets = open_sets(run, architecture, start_model);
  schedule_of(options_, options_.total_steps(sets.train.epoch_sequences()));
  int64_t head = 0;
  const Selection selection = trained(run, checkpoint, architecture, sets.train, &head);
  for (const Matrix& matrix : selection.matrices)
    method_->check(architecture.weight_name(matrix.block, matrix.linear), matrix.linear.out,
                   matrix.linear.in);
  check_start(run, checkpoint);
  if (options_.adapter_from) {
    const StoredAdapter stored = StoredAdapter::read(adapter_file_of(*options_.adapter_from));
    stored.require_method(options_.method, method_->settings());
    if (run.takes_start_model)  // the checksum reads all of it, as the stage would
      stored.require_base(driver::tensors_checksum(checkpoint, run.group),
                          checkpoint.directory().string());
  }
  if (!run.group.is_root()) return;
  // What an earlier start has left is replaced, not added to.
  const int64_t there = bytes_below(run.directory);
  io::require_space(run.directory,
                    std::max<int64_t>(0, bytes_on_disk(selection, head, run.dtype) - there));
}

/// Whether an entry before this one can leave what the training starts from.
void RetrainStage::check_start(const driver::RunContext& run,
                               const io::Checkpoint& start_model) const {
  if (options_.adapter_previous &&
      !std::ranges::any_of(run.earlier, &driver::EarlierEntry::leaves_adapter) &&
      model::matrices_with_terms(start_model).empty())
    throw UserError(fmt::format(
        "retrain.adapter: previous, but nothing stands beside the matrices of {} and no retrain "
        "stage before this one in pipeline ends with merge: beside; set merge: beside there",
        start_model.directory().string()));
  const bool starts_new = !options_.adapter_previous && !options_.adapter_from;
  const auto leaves_sets = [](const driver::EarlierEntry& entry) {
    return entry.kind == "discover";
  };
  if (starts_new && method_->needs_index_sets() && !options_.index_sets &&
      !std::ranges::any_of(run.earlier, leaves_sets))
    throw UserError(
        "retrain.index_sets: no discover stage stands before this one in pipeline; put discover "
        "there, name a file index_sets.h5, or choose random or none");
}

/// The most that lies below the stage's directory at once: the saved state, the older one until the
/// newer one is whole (values and two moments, and the best values), then adapters.h5 and the
/// model.
int64_t RetrainStage::bytes_on_disk(const Selection& selection, int64_t head,
                                    at::ScalarType dtype) const {
  constexpr int64_t kNumber = sizeof(float);
  const int64_t trained = trainable_parameters(selection, *method_) + head;
  const bool keeps_best = options_.validate.wanted() && options_.validate.keep_best;
  const int64_t state = trained * kNumber * (keeps_best ? 4 : 3), adapters = trained * kNumber;
  int64_t written = 0;  // what is merged, and what is trained whole
  for (const Matrix& matrix : selection.matrices) written += matrix.linear.out * matrix.linear.in;
  if (options_.merge == Merge::beside) written = 0;
  for (const PlacedSite& placed : selection.sites)
    written += c10::multiply_integers(placed.site.shape);
  const int64_t model = options_.merge == Merge::beside ? adapters : head * kNumber;
  return std::max(2 * state, state + adapters + model +
                                 written * static_cast<int64_t>(c10::elementSize(dtype)));
}

driver::StagePlan RetrainStage::plan(const driver::RunContext& run,
                                     const std::filesystem::path& start_model) const {
  const io::Checkpoint checkpoint = io::Checkpoint::open(start_model);
  const model::Architecture architecture = model::read_architecture(checkpoint);
  const Sets sets = open_sets(run, architecture, start_model);
  int64_t head = 0;
  const Selection selection = trained(run, checkpoint, architecture, sets.train, &head);
  const int64_t epoch = sets.train.epoch_sequences(), steps = options_.total_steps(epoch);
  driver::StagePlan plan = plan_of(selection, architecture, options_.method, *method_, head);
  plan.lines.push_back(
      fmt::format("{} steps of {} sequences of at most {} tokens, {} tokens a step; {} sequences "
                  "an epoch of {}",
                  steps, options_.batch_size, options_.sequence_length,
                  options_.batch_size * options_.sequence_length, epoch, run.train_data.string()));
  if (sets.validation)
    plan.lines.push_back(fmt::format("validation: {} of {} sequences", sets.validation->metric(),
                                     sets.validation->sequences()));
  else
    plan.lines.emplace_back(kNothingValidated);
  plan.lines.push_back(fmt::format("merge: {}", merge_name(options_.merge)));
  return plan;
}

std::string RetrainStage::checksum_of_inputs() const {
  std::vector<std::filesystem::path> files;
  if (options_.adapter_from) files.push_back(adapter_file_of(*options_.adapter_from));
  if (options_.index_sets) files.emplace_back(*options_.index_sets);
  std::string checksums = std::string(kNumericsVersion) + " ";
  for (const std::filesystem::path& file : files) checksums += io::file_checksum(file) + " ";
  return checksums;
}

ModelOptions RetrainStage::model_options(const driver::StageContext& context,
                                         const io::Checkpoint& checkpoint,
                                         const model::Architecture& architecture,
                                         const TrainingData& data, const Start& start) const {
  ModelOptions options(options_.targets);
  options.attach = {options_.merge,
                    context.run.seed,
                    context.run.workers,
                    &context.run.group,
                    find_index_sets(options_, context.directory),
                    start.stored ? start.stored->frozen() : std::map<std::string, at::Tensor>()};
  options.without_terms = options_.adapter_previous;
  if (!data.labelled()) return options;
  options.head =
      model::load_sequence_head(checkpoint, architecture, data.logits(), context.run.seed,
                                /*replace=*/true, data.set().label_names());
  options.problem = data.problem();
  options.head_rate_factor =
      options_.head_learning_rate.value_or(options_.learning_rate) / options_.learning_rate;
  return options;
}

train::LoopOptions RetrainStage::loop_options(const driver::StageContext& context, const Sets& sets,
                                              const std::string& fingerprint) const {
  const int64_t epoch = sets.train.epoch_sequences(), steps = options_.total_steps(epoch);
  train::LoopOptions loop;
  loop.steps = steps;
  loop.units = options_.units();
  loop.learning_rate = options_.learning_rate;
  loop.schedule = schedule_of(options_, steps);
  loop.adamw = options_.adamw;
  loop.max_grad_norm = options_.max_grad_norm;
  loop.checkpoint_every = options_.checkpoint_every;
  loop.checkpoint_file = context.state_directory() / "step.h5";
  loop.fingerprint = fingerprint;
  if (!sets.validation) return loop;
  loop.keep_best = options_.validate.keep_best;
  loop.patience = options_.validate.patience;
  loop.validate_after = [this, steps, epoch](int64_t done) {
    if (done == steps) return true;
    if (options_.validate.every_steps) return done % *options_.validate.every_steps == 0;
    const auto epochs = [&](int64_t after) { return after * options_.batch_size / epoch; };
    return epochs(done) > epochs(done - 1);
  };
  return loop;
}

double RetrainStage::validate(driver::StageContext& context, const AdaptedModel& model,
                              const Validation& validation, int64_t steps) const {
  const driver::RunContext& run = context.run;
  const data::Metrics metrics = validation.measure(model, run.seed, *run.workers, run.group);
  nlohmann::json line = {{"event", "validation"}, {"step", steps}};
  for (const auto& [name, value] : metrics) line[name] = value;
  context.progress.metric(line);
  context.progress.say(fmt::format("validation after step {}: {} {:.5f}, loss {:.5f}", steps,
                                   validation.metric(), metrics.at(validation.metric()),
                                   metrics.at("loss")));
  return validation.score(metrics);
}

train::LoopResult RetrainStage::train(driver::StageContext& context, AdaptedModel& model,
                                      train::ParameterSet& parameters, const Sets& sets,
                                      const std::string& fingerprint) const {
  const driver::RunContext& run = context.run;
  const train::LoopOptions loop = loop_options(context, sets, fingerprint);
  train::Problem problem;
  problem.parameters = &parameters;
  problem.prepare_step = [&] { model.adapter().prepare_step(*run.workers); };
  problem.unit = [&](int64_t step, int64_t unit, const train::GradientSink& sink) {
    const int64_t micro = options_.micro_batch_size;
    const UnitKey key{run.seed, step, unit * micro, micro};
    const UnitBatch batch =
        sets.train.micro_batch(step * options_.batch_size, options_.batch_size, unit, micro);
    return model.loss_and_gradients(batch, key, options_.activation_checkpointing, sink);
  };
  problem.costs = [&](int64_t step) {
    return sets.train.micro_batch_costs(step * options_.batch_size, options_.batch_size,
                                        options_.micro_batch_size);
  };
  problem.validate = [&](int64_t steps) {
    return validate(context, model, *sets.validation, steps);
  };
  train::LoopEvents events;
  events.started = [&](int64_t done) { context.progress.start("steps", loop.steps, done); };
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
  const train::LoopResult result = train::run_loop(loop, problem, events, *run.workers, run.group);
  context.progress.finish();
  return result;
}

Difference RetrainStage::compare(driver::StageContext& context, const AdaptedModel& model,
                                 const TrainingData& data,
                                 const std::filesystem::path& written) const {
  const driver::RunContext& run = context.run;
  const bool labelled = data.labelled();
  const int64_t length =
      labelled ? options_.sequence_length : std::min(options_.sequence_length, kComparedTokens);
  const TrainingData few(data.set(), run.seed, length, true);
  std::vector<UnitBatch> batches;
  for (int64_t i = 0; i < std::min(kComparedSequences, few.epoch_sequences()); ++i)
    batches.push_back(few.batch(i, 1));
  return difference_to_written(model, written, batches, run.seed, *run.workers, run.group);
}

void RetrainStage::say_merged(driver::StageContext& context, const MergeReport& merged) const {
  if (options_.merge == Merge::beside)
    context.progress.say(fmt::format("the adapter stays beside {} nonzeros, {} with it",
                                     merged.nonzeros_before, merged.nonzeros_after));
  else
    context.progress.say(
        fmt::format("merged {}: {} nonzeros before, {} after, {} zeros filled ({:.2f} % of the "
                    "zeros), {} of {} "
                    "weights changed",
                    merge_name(options_.merge), merged.nonzeros_before, merged.nonzeros_after,
                    merged.filled, 100 * merged.share_filled(), merged.changed, merged.elements));
}

nlohmann::json metrics_of(const train::LoopResult& trained) {
  const double seconds = trained.seconds;
  return {{"steps", trained.steps},
          {"tokens", trained.tokens},
          {"loss_first", trained.loss_first},
          {"loss_last", trained.loss_last},
          {"tokens_per_second", seconds > 0 ? static_cast<double>(trained.tokens) / seconds : 0.0}};
}

driver::StageResult RetrainStage::carry_out(driver::StageContext& context) const {
  const driver::RunContext& run = context.run;
  const io::Checkpoint checkpoint = io::Checkpoint::open(context.input_model);
  const model::Architecture architecture = model::read_architecture(checkpoint);
  const Sets sets = open_sets(run, architecture, context.input_model);
  const Start start = find_start(options_, *method_, checkpoint, run.group);
  const std::string fingerprint = io::checksum(
      fmt::format("{} {} {} {} {} {} {}", kNumericsVersion, configuration_, sets.checksum,
                  start.base_checksum, run.seed, c10::toString(run.dtype),
                  run.group.broadcast(run.group.is_root() ? checksum_of_inputs() : "")));

  AdaptedModel model(checkpoint, architecture, run.dtype, *method_,
                     model_options(context, checkpoint, architecture, sets.train, start));
  const std::unique_ptr<train::ParameterSet> parameters = model.make_parameters(run.seed);
  if (start.stored) {
    // The model's own head is the stored one, or what was pruned of it since.
    const bool wanted = !options_.adapter_previous;
    const bool with_head = start.stored->copy_into(*parameters, model, wanted);
    model.adapter().prepare_step(*run.workers);
    if (options_.adapter_previous) start.stored->require_beside(model, checkpoint);
    context.progress.say(
        fmt::format("starts from {}{}", start.stored->file().string(),
                    model.head() && wanted && !with_head ? ", its head left out" : ""));
  }
  const int64_t head = model.head_size(), trainable = parameters->size() - head;
  context.progress.say(
      fmt::format("{} trainable parameters at {} matrices and {} other tensors, "
                  "and {} of a head",
                  trainable, model.targets().size(), model.sites().size(), head));
  int64_t reported = 0, masked = 0;
  for (const Target& target : model.targets()) {
    reported += method_->reported_parameters(target.weight.size(0), target.weight.size(1));
    masked += target.kept.defined();
  }
  for (const auto& site : model.sites()) reported += c10::multiply_integers(site.site.shape);
  reported = std::min(reported, trainable);  // some may have gone with removed heads
  if (reported != trainable)
    context.progress.say(fmt::format("its paper counts {} of them", reported));
  if (options_.method == "lora" && masked > 0)
    context.progress.say(
        fmt::format("merge: masked makes lora the same as lora_masked: it trains inside the mask "
                    "of {} matrices",
                    masked));
  if (!sets.validation) context.progress.say(kNothingValidated);
  const train::LoopResult trained = train(context, model, *parameters, sets, fingerprint);

  model.adapter().prepare_step(*run.workers);
  if (run.group.is_root())
    write_adapters(context.directory / "adapters.h5", model, *parameters,
                   {options_.method, method_->settings().dump(), start.base_checksum});
  driver::StageResult result;
  result.model = context.directory / "model";
  if (sets.train.labelled() && run.group.is_root())
    model::write_label_names(
        result.model,
        model::names_after_training(checkpoint, architecture, sets.train.set().label_names()));
  const MergeReport merged =
      write_model(result.model, checkpoint, model, options_.merge, *run.workers, run.group);
  say_merged(context, merged);
  const Difference difference = compare(context, model, sets.train, result.model);

  result.metrics = metrics_of(trained);
  result.metrics.update({{"method", options_.method},
                         {"trainable_parameters", trainable},
                         {"reported_parameters", reported},  // as its paper counts
                         {"head_parameters", head},
                         {"merge", merge_name(options_.merge)},
                         {"nonzeros_before", merged.nonzeros_before},
                         {"nonzeros_after", merged.nonzeros_after},
                         {"zeros_filled", merged.filled},
                         {"weights_changed", merged.changed},
                         {"share_of_zeros_filled", merged.share_filled()},
                         {"weight_distance", merged.weight_distance},
                         {"merge_largest_logit_difference", difference.largest_logit},
                         {"merge_kl", difference.mean_kl},
                         {"merge_compared_positions", difference.positions},
                         {"data_checksum", sets.train.set().checksum()},
                         {"sequence_length", options_.sequence_length}});
  if (merged.map_distance) result.metrics["map_distance"] = *merged.map_distance;
  if (sets.validation)
    result.metrics["validation"] = {{"metric", sets.validation->metric()},
                                    {"sequences", sets.validation->sequences()},
                                    {"count", trained.validations},
                                    {"best_step", trained.best_step},
                                    {"kept_step", trained.kept_step}};
  if (trained.validations > 0)
    result.metrics["validation"]["best_value"] = sets.validation->value(trained.best_score);
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
