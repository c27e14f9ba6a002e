/// The `evaluate` stage: measures a model by its tasks and counts what it holds; changes nothing.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <filesystem>

#include "pipeline/errors.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"
#include "stages/evaluate/perplexity.h"

namespace espalier::evaluate {
namespace {

struct Task {
  std::string name;
  std::filesystem::path data;
  int64_t sequence_length = 2048;
  std::optional<int64_t> segments;
};

std::vector<Task> read_tasks(const config::Section& section) {
  std::vector<Task> tasks;
  section.allow({"stage", "from"});
  for (const auto& [name, task] : section.children("tasks")) {
    task.choice("kind", {"perplexity"});
    task.allow({"shots"});
    tasks.push_back({name, task.text("data"),
                     task.integer_or("sequence_length", 2048, {.low = 2, .high = 1e6}),
                     task.optional_integer("segments", {.low = 1})});
  }
  if (tasks.empty()) section.fail("tasks", "there is no task to evaluate");
  return tasks;
}

/// Nonzeros, parameters and bytes; tensors are spread over ranks.
nlohmann::json count_model(const io::Checkpoint& checkpoint, const comm::Communicator& group) {
  c10::InferenceMode guard;
  std::vector<int64_t> counts(2);
  int64_t number = 0;
  for (const auto& name : checkpoint.names()) {
    if (number++ % group.size() != group.rank()) continue;
    const at::Tensor tensor = checkpoint.view(name);
    counts[0] += at::count_nonzero(tensor).item<int64_t>();
    counts[1] += tensor.numel();
    checkpoint.drop(name);
  }
  group.all_reduce_sum(counts);
  return {{"nonzeros", counts[0]}, {"parameters", counts[1]}, {"bytes", checkpoint.bytes()}};
}

class EvaluateStage : public driver::Stage {
 public:
  explicit EvaluateStage(const config::Section& section) : tasks_(read_tasks(section)) {}

  void check(const driver::RunContext&, const std::filesystem::path& start_model) const override {
    const io::Checkpoint checkpoint = io::Checkpoint::open(start_model);
    const model::Architecture architecture = model::read_architecture(checkpoint);
    if (architecture.task != model::Task::causal)
      throw UserError(fmt::format("{}: perplexity is of causal language models; this is {}",
                                  start_model.string(), architecture.model_type));
    for (const auto& task : tasks_) segments_of(open(task, architecture, start_model));
  }

  std::vector<std::filesystem::path> token_sets(const driver::RunContext&) const override {
    std::vector<std::filesystem::path> sets;
    for (const auto& task : tasks_) sets.push_back(task.data);
    return sets;
  }

  driver::StageResult carry_out(driver::StageContext& context) const override {
    const io::Checkpoint checkpoint = io::Checkpoint::open(context.input_model);
    const model::Architecture architecture = model::read_architecture(checkpoint);
    nlohmann::json metrics = {{"tasks", nlohmann::json::object()},
                              {"model", count_model(checkpoint, context.run.group)}};
    for (const auto& task : tasks_) {
      const PerplexityTask opened = open(task, architecture, context.input_model);
      const Perplexity result = measure_perplexity(context, checkpoint, opened);
      metrics["tasks"][task.name] = {
          {"kind", "perplexity"},
          {"perplexity", result.perplexity},
          {"mean_loss", result.mean_loss},
          {"tokens", result.tokens},
          {"segments", result.segments},
          {"sequence_length", task.sequence_length},
          {"dtype", context.run.dtype == at::kFloat ? "float32" : "bfloat16"},
          {"seed", context.run.seed},
          {"data", task.data.filename().string()},
          {"data_checksum", opened.set.checksum()}};
      context.progress.say(fmt::format("{}: perplexity {:.3f} ({} segments of {})", task.name,
                                       result.perplexity, result.segments, task.sequence_length));
      context.progress.metric({{"task", task.name}, {"perplexity", result.perplexity}});
    }
    return {context.input_model, std::move(metrics)};
  }

 private:
  static PerplexityTask open(const Task& task, const model::Architecture& architecture,
                             const std::filesystem::path& model) {
    PerplexityTask opened{data::TokenSet::open(task.data), task.sequence_length, task.segments};
    opened.set.require_vocabulary(architecture.vocabulary, model.string());
    return opened;
  }

  std::vector<Task> tasks_;
};

const driver::StageRegistration registration{
    "evaluate", [](const config::Section& section) -> std::unique_ptr<driver::Stage> {
      return std::make_unique<EvaluateStage>(section);
    }};

}  // namespace
}  // namespace espalier::evaluate
