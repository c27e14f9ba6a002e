/// The `evaluate` stage: measures a model by its tasks and counts what it holds; changes nothing.

#include <ATen/ATen.h>

#include <filesystem>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"
#include "stages/evaluate/measurement.h"

namespace espalier::evaluate {
namespace {

std::vector<std::unique_ptr<Measurement>> read_tasks(const config::Section& section) {
  std::vector<std::unique_ptr<Measurement>> tasks;
  section.allow({"stage", "from"});
  for (const auto& [name, task] : section.children("tasks"))
    tasks.push_back(make_measurement(name, task));
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

  void check(const driver::RunContext& run,
             const std::filesystem::path& start_model) const override {
    const model::Architecture architecture =
        model::read_architecture(io::Checkpoint::open(start_model));
    for (const auto& task : tasks_) task->check(run, architecture, start_model);
  }

  std::vector<std::filesystem::path> token_sets(const driver::RunContext&) const override {
    std::vector<std::filesystem::path> sets;
    for (const auto& task : tasks_) sets.push_back(task->file);
    return sets;
  }

  driver::StagePlan plan(const driver::RunContext&, const std::filesystem::path&) const override {
    driver::StagePlan plan;
    for (const auto& task : tasks_)
      plan.lines.push_back(task->name + ": " + task->plan() + " of " + task->file.string());
    return plan;
  }

  driver::StageResult carry_out(driver::StageContext& context) const override {
    const io::Checkpoint checkpoint = io::Checkpoint::open(context.input_model);
    const model::Architecture architecture = model::read_architecture(checkpoint);
    nlohmann::json metrics = {{"tasks", nlohmann::json::object()},
                              {"model", count_model(checkpoint, context.run.group)}};
    for (const auto& task : tasks_) {
      nlohmann::json row = task->measure(context, checkpoint, architecture);
      row["dtype"] = context.run.dtype == at::kFloat ? "float32" : "bfloat16";
      row["seed"] = context.run.seed;
      row["data"] = task->file.filename().string();
      metrics["tasks"][task->name] = std::move(row);
    }
    return {context.input_model, std::move(metrics)};
  }

 private:
  std::vector<std::unique_ptr<Measurement>> tasks_;
};

const driver::StageRegistration registration{
    "evaluate", [](const config::Section& section) -> std::unique_ptr<driver::Stage> {
      return std::make_unique<EvaluateStage>(section);
    }};

}  // namespace
}  // namespace espalier::evaluate
