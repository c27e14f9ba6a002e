/// prune.method=dsee: masks by global thresholds (dsee.h), or the scores of heads (criterion.h).

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/json.h"
#include "pipeline/linalg/selection.h"
#include "pipeline/model/stored_layers.h"
#include "stages/prune/dsee.h"
#include "stages/prune/method.h"

namespace espalier::prune {
namespace {

using nlohmann::json;

json group_json(const DseeLosses::Group& group) {
  return {{"matrices", group.matrices}, {"weights", group.weights}, {"lost", group.lost}};
}

DseeLosses::Group group_of(const json& value) {
  return {value.at("matrices"), value.at("weights"), value.at("lost")};
}

/// What an earlier start of the stage found. Throws UserError naming the file when it is not whole.
DseeLosses read_losses(const std::string& text, const std::string& file, size_t units) {
  const json content = io::parse_json(text, file);
  try {
    DseeLosses losses{content.at("count"), group_of(content.at("with_terms")),
                      group_of(content.at("without_terms"))};
    if (losses.count.size() == units) return losses;
  } catch (const json::exception&) {  // said below
  }
  throw UserError(fmt::format("{}: not what dsee found in {} units; remove it", file, units));
}

class Dsee : public PruningMethod {
 public:
  explicit Dsee(const config::Section& section) : section_(section) {
    const std::map<std::string, Criterion> criteria = {{"delta", Criterion::delta},
                                                       {"merged", Criterion::merged},
                                                       {"magnitude", Criterion::magnitude},
                                                       {"random", Criterion::random}};
    if (!section.is_null("criterion"))
      name_ = section.choice("criterion", {"delta", "merged", "magnitude", "random"});
    section.allow({"criterion"});
    rule_.criterion = criteria.at(name_);
    if (section.text_or("allocation", "uniform") != "uniform")
      section.fail("allocation",
                   "dsee gives all blocks one threshold, and a block loses what lies below it; "
                   "choose uniform");
    for (const config::Section& item : section.items("overrides"))
      if (!item.flag_or("skip", false))
        section.fail("overrides",
                     "dsee has one threshold for many matrices; an override can only skip some");
  }

  void check(const Pattern& pattern) const override {
    if (!pattern.unstructured())
      section_.fail("pattern", fmt::format("dsee removes weights by a threshold over all blocks; "
                                           "choose unstructured instead of \"{}\"",
                                           pattern.name()));
  }
  void check_start(const Pattern& pattern, const driver::RunContext& run,
                   const io::Checkpoint& start) const override {
    if (!std::ranges::any_of(run.earlier, &driver::EarlierEntry::leaves_adapter))
      require_adapter(pattern, start);
  }
  bool prunes_pooler() const override { return true; }
  std::optional<int64_t> zeros(const Pattern&, int64_t, int64_t) const override {
    return std::nullopt;
  }
  std::optional<int64_t> zeros_of_all(const Pattern& pattern, int64_t weights) const override {
    return pattern.removed_of(weights);
  }
  void prepare(const ModelWork& work) override;
  void prune(BlockWork& work) override {
    prune_dsee(work.tasks, terms_of(work.tasks), losses_.count.at(work.block), rule_,
               work.workers(), work.group());
  }
  std::vector<double> head_scores(const HeadWork& work) const override;
  json facts() const override {
    json facts = {{"criterion", name_}};
    if (losses_.count.empty()) return facts;  // of heads
    facts["with_terms"] = group_json(losses_.with_terms);
    facts["without_terms"] = group_json(losses_.without_terms);
    return facts;
  }

 private:
  void require_adapter(const Pattern& pattern, const io::Checkpoint& model) const;
  std::vector<Terms> terms_of(const std::vector<MatrixTask>& tasks) const {
    std::vector<Terms> terms;
    for (const MatrixTask& task : tasks)
      terms.push_back(
          model::load_terms(*checkpoint_, task.name, task.weight.size(0), task.weight.size(1)));
    return terms;
  }
  DseeLosses walk(const ModelWork& work) const;

  config::Section section_;
  std::string name_ = "delta";
  DseeRule rule_;
  std::optional<io::Checkpoint> checkpoint_;
  DseeLosses losses_;
};

DseeLosses Dsee::walk(const ModelWork& work) const {
  const driver::RunContext& run = work.context.run;
  const auto walks = static_cast<int64_t>(linalg::StreamedSelection::kPasses * work.sizes.size());
  work.context.progress.start("blocks for dsee's thresholds", walks);
  const auto matrices = [&](int64_t unit) {
    JudgedMatrices judged{work.tasks(unit), {}};
    judged.terms = terms_of(judged.tasks);
    return judged;
  };
  const DseeLosses losses =
      count_dsee_losses(work.sizes, matrices, rule_, *run.workers, run.group, [&](int64_t done) {
        work.context.progress.advance(done);
        if (driver::stop_requested(run.group))
          throw Requeue("prune: stopped while dsee's thresholds were found");
      });
  work.context.progress.finish();
  return losses;
}

/// Of a model without terms all matrices go by |W|, whatever the criterion but magnitude, and no
/// head is judged by a change.
void Dsee::require_adapter(const Pattern& pattern, const io::Checkpoint& model) const {
  if (rule_.criterion == Criterion::magnitude ||
      (rule_.criterion == Criterion::random && pattern.heads > 0) ||
      !model::matrices_with_terms(model).empty())
    return;
  throw UserError(fmt::format(
      "prune.criterion: {} judges the matrices that have an adapter beside them, and nothing "
      "stands beside those of {}: put a retrain stage with merge: beside before this one "
      "(retrain=dsee), or take magnitude, which judges every matrix by |W|",
      name_, model.directory().string()));
}

void Dsee::prepare(const ModelWork& work) {
  const comm::Communicator& group = work.context.run.group;
  checkpoint_ = work.checkpoint;
  rule_.sparsity = work.pattern.sparsity;
  rule_.seed = work.context.run.seed;
  rule_.keep_zeros = work.keep_zeros;
  require_adapter(work.pattern, work.checkpoint);
  const std::string kept = group.broadcast(
      group.is_root() && exists(work.journal) ? io::read_file(work.journal) : std::string());
  if (!kept.empty()) {
    losses_ = read_losses(kept, work.journal.string(), work.sizes.size());
    return;
  }
  losses_ = walk(work);
  work.context.progress.say(fmt::format(
      "dsee: {} matrices with an adapter lose {} of {} weights, {} others {} of {}",
      losses_.with_terms.matrices, losses_.with_terms.lost, losses_.with_terms.weights,
      losses_.without_terms.matrices, losses_.without_terms.lost, losses_.without_terms.weights));
  const json content = {{"count", losses_.count},
                        {"with_terms", group_json(losses_.with_terms)},
                        {"without_terms", group_json(losses_.without_terms)}};
  if (group.is_root()) io::write_file(work.journal, content.dump());
}

std::vector<double> Dsee::head_scores(const HeadWork& work) const {
  const model::Architecture& a = work.architecture;
  const auto judged = [&](model::Role role) {
    const model::Linear linear = a.in_block(work.block, *a.find(role));
    const std::string name = a.weight_name(work.block, linear);
    const std::string stored = model::stored_weight_name(a, work.block, linear);
    Judged matrix{name,
                  model::layer_part(a, linear, work.checkpoint.view(stored))
                      .to(at::kFloat, false, /*copy=*/true, at::MemoryFormat::Contiguous),
                  model::load_terms(work.checkpoint, name, linear.out, linear.in)};
    work.checkpoint.drop(stored);
    return matrix;
  };
  return judged_heads(rule_.criterion, judged(model::kQuery), judged(model::kValue),
                      a.heads_of(work.block), a.head_size, work.seed);
}

const MethodRegistration registration{
    "dsee",
    [](const config::Section& section) { return std::make_unique<Dsee>(section); },
    {"criterion", "heads"}};

}  // namespace
}  // namespace espalier::prune
