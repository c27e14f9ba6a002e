/// The `evaluate` stage: measures a model by its tasks and counts what it holds; changes nothing.

#include <ATen/ATen.h>

#include <filesystem>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"
#include "pipeline/model/parameter_names.h"
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

/// Of every parameter; they are spread over ranks.
model::TensorCounts count_parameters(const io::Checkpoint& checkpoint,
                                     const model::Architecture& architecture,
                                     const comm::Communicator& group) {
  c10::InferenceMode guard;
  const std::vector<std::string> names = model::parameter_names(checkpoint, architecture);
  std::vector<int64_t> nonzeros(names.size());
  for (size_t i = group.rank(); i < names.size(); i += group.size()) {
    nonzeros[i] = at::count_nonzero(checkpoint.view(names[i])).item<int64_t>();
    checkpoint.drop(names[i]);
  }
  group.all_reduce_sum(nonzeros);
  model::TensorCounts counts;
  for (size_t i = 0; i < names.size(); ++i)
    counts[names[i]] = {checkpoint.info(names[i]).elements(), nonzeros[i]};
  return counts;
}

nlohmann::json sums_of(const model::TensorCounts& counts, const io::Checkpoint& checkpoint) {
  model::TensorCount sum;
  for (const auto& [name, count] : counts) {
    sum.elements += count.elements;
    sum.nonzeros += count.nonzeros;
  }
  return {{"nonzeros", sum.nonzeros}, {"parameters", sum.elements}, {"bytes", checkpoint.bytes()}};
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

  std::string checksum_of_inputs() const override {
    std::string versions;
    for (const auto& task : tasks_) versions += task->numerics();
    return versions;
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
    const model::TensorCounts counts =
        count_parameters(checkpoint, architecture, context.run.group);
    nlohmann::json metrics = {{"tasks", nlohmann::json::object()},
                              {"model", sums_of(counts, checkpoint)}};
    for (const auto& task : tasks_) {
      nlohmann::json row = task->measure(context, checkpoint, architecture, counts);
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
