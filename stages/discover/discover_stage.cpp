/// The stage `discover`: index sets for sparse residuals. It leaves the model as it was.

#include <fmt/format.h>

#include "pipeline/driver/stage.h"
#include "pipeline/driver/stage_hooks.h"
#include "pipeline/driver/text_table.h"
#include "pipeline/errors.h"
#include "stages/discover/index_sets.h"

namespace espalier::discover {
namespace {

class DiscoverStage : public driver::Stage {
 public:
  explicit DiscoverStage(const config::Section& section)
      : method_name_(section.text("method")),
        method_(make_method(section)),
        cardinality_(section.integer("cardinality", {.low = 1})),
        targets_(section.texts("targets")) {
    if (targets_.empty())
      section.fail("targets", "the list is empty; name matrices, such as [q_proj, v_proj]");
    section.allow({"stage", "from"});
    section.finish();
  }

  void check(const driver::RunContext&, const std::filesystem::path& start_model) const override {
    for (const TargetMatrix& target :
         target_matrices(model::read_architecture(io::Checkpoint::open(start_model)), targets_)) {
      if (cardinality_ > target.rows * target.columns)
        throw UserError(fmt::format("discover.cardinality: {} is more than the {} entries of {}",
                                    cardinality_, target.rows * target.columns, target.name));
      method_->check(target.name, target.rows, target.columns);
    }
  }

  driver::StagePlan plan(const driver::RunContext&,
                         const std::filesystem::path& start_model) const override {
    const model::Architecture architecture =
        model::read_architecture(io::Checkpoint::open(start_model));
    const auto targets = target_matrices(architecture, targets_);
    std::vector<driver::BlockRow> rows;
    for (const TargetMatrix& target : targets)
      rows.push_back(
          {target.block,
           architecture.block_prefix,
           "." + target.layer.name,
           {fmt::format("{} x {}", target.rows, target.columns), fmt::format("{}", cardinality_)}});
    driver::StagePlan plan{{fmt::format("{}: {} positions in each of {} matrices, {} in all",
                                        method_name_, cardinality_, targets.size(),
                                        cardinality_ * static_cast<int64_t>(targets.size()))},
                           driver::folded_rows(rows)};
    plan.table.insert(plan.table.begin(), {"matrix", "shape", "positions"});
    return plan;
  }

  driver::StageResult carry_out(driver::StageContext& context) const override {
    const driver::RunContext& run = context.run;
    const auto checkpoint = io::Checkpoint::open(context.input_model);
    const model::Architecture architecture = model::read_architecture(checkpoint);
    driver::StageResult result;
    result.metrics =
        discover_index_sets(checkpoint, architecture, target_matrices(architecture, targets_),
                            {method_name_, *method_, cardinality_, run.seed}, context.directory,
                            run.group, *run.workers, driver::hooks_of(context));
    result.model = context.input_model;
    context.progress.finish();
    if (run.group.is_root())
      context.progress.say(fmt::format("index_sets.h5: {} positions in each of {} matrices",
                                       cardinality_, result.metrics["matrices"].size()));
    return result;
  }

 private:
  std::string method_name_;
  std::unique_ptr<Method> method_;
  int64_t cardinality_;
  std::vector<std::string> targets_;
};

const driver::StageRegistration registration{"discover", [](const config::Section& section) {
                                               return std::make_unique<DiscoverStage>(section);
                                             }};

}  // namespace
}  // namespace espalier::discover
