/// Classification and regression of sequences: the head's logits for every row of a labelled set,
/// held against its labels. Rows are neither cut nor dropped.

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>

#include "pipeline/data/label_metrics.h"
#include "pipeline/data/sequence_batch.h"
#include "pipeline/data/token_set.h"
#include "pipeline/errors.h"
#include "pipeline/model/sequence_head.h"
#include "stages/evaluate/answers.h"
#include "stages/evaluate/measurement.h"
#include "stages/evaluate/score_units.h"

namespace espalier::evaluate {
namespace {

constexpr int64_t kUnitTokens = 2048;

class Classification : public Measurement {
 public:
  explicit Classification(const config::Section& section)
      : length_(section.optional_integer("sequence_length", {.low = 1, .high = 1e6})),
        answers_(section.flag_or("answers", false)) {
    refuse_key(section, "shots", "multiple_choice");
    refuse_key(section, "segments", "perplexity");
  }

  void check(const driver::RunContext& run, const model::Architecture& architecture,
             const std::filesystem::path& start_model) const override {
    const data::TokenSet set = open(architecture, start_model);
    const io::Checkpoint checkpoint = io::Checkpoint::open(start_model);
    const bool other_head =  // may be left by a stage before this one
        std::any_of(run.earlier.begin(), run.earlier.end(), [](const driver::EarlierEntry& entry) {
          return entry.kind == "retrain" || entry.kind == "compress";
        });
    model::load_sequence_head(checkpoint, architecture, labels_of(set), run.seed,
                              /*replace=*/other_head, set.label_names());
    if (set.has_token_types() && !architecture.type_embedding.empty() &&
        checkpoint.info(architecture.type_embedding).shape[0] < 2 && uses_second_type(set))
      throw UserError(fmt::format(
          "{}: has token types of a second sentence, and {} knows one type; prepare the data with "
          "this model's tokenizer",
          set.path().string(), start_model.string()));
  }

  nlohmann::json measure(driver::StageContext& context, const io::Checkpoint& checkpoint,
                         const model::Architecture& architecture,
                         const model::TensorCounts& counts) const override {
    const data::TokenSet set = open(architecture, context.input_model);
    const int64_t columns = labels_of(set);
    const model::SequenceHead head =
        model::load_sequence_head(checkpoint, architecture, columns, context.run.seed,
                                  /*replace=*/false, set.label_names());
    const std::vector<std::string> drawn = head.created();
    if (!drawn.empty())
      context.progress.say(fmt::format(
          "{}: the model has no classification head yet; {} are drawn from run.seed, so this is "
          "what chance gives",
          name, fmt::join(drawn, ", ")));
    const std::vector<double> logits = score(context, checkpoint, architecture, set, head);
    std::vector<double> labels;
    for (int64_t d = 0; d < set.documents(); ++d) labels.push_back(set.label(d));
    data::Metrics metrics = data::label_metrics(set.classes(), labels, logits);
    metrics["mean_loss"] = mean_loss(set, logits);

    nlohmann::json row = {{"kind", "classification"},
                          {"task", set.task()},
                          {"rows", set.documents()},
                          {"tokens", tokens_of(set)},
                          {"classes", set.classes()},
                          {"reported", data::metrics_of_task(set)},
                          {"head", drawn.empty() ? "model" : "drawn"},
                          {"data_checksum", set.checksum()}};
    if (length_) row["sequence_length"] = *length_;
    model::TensorCount matrices;
    for (const model::HeadTensor& tensor : head.tensors) {
      if (tensor.value.dim() < 2) continue;
      matrices.elements += tensor.value.numel();
      matrices.nonzeros += tensor.value.ne(0).sum().item<int64_t>();
    }
    std::vector<ScoredSequence> sequences;
    for (int64_t d = 0; d < set.documents(); ++d) sequences.push_back({set.document_tokens(d), 1});
    add_flops(row, {architecture, counts, matrices}, sequences);
    std::string said;
    for (const auto& [metric, value] : metrics) {
      row[metric] = value;
      said += fmt::format("{}{} {:.4f}", said.empty() ? "" : ", ", metric, value);
    }
    if (answers_)
      row["answers"] = write_answers(context, name, set.documents(), [&](int64_t d) {
        const auto first = logits.begin() + d * columns;
        return nlohmann::json{{"row", d},
                              {"label", set.label(d)},
                              {"logits", std::vector<double>(first, first + columns)}};
      });
    context.progress.say(fmt::format("{}: {} ({} rows)", name, said, set.documents()));
    nlohmann::json event = {{"task", name}};
    for (const std::string& metric : data::metrics_of_task(set)) event[metric] = metrics.at(metric);
    context.progress.metric(event);
    return row;
  }

  std::string plan() const override {
    const data::TokenSet set = data::TokenSet::open(file);
    const std::vector<std::string> metrics = data::metrics_of_task(set);
    return fmt::format("{} of {} rows, {} tokens", fmt::join(metrics, " and "), set.documents(),
                       tokens_of(set));
  }

 private:
  static int64_t labels_of(const data::TokenSet& set) {
    return std::max<int64_t>(1, set.classes());
  }

  static int64_t tokens_of(const data::TokenSet& set) {
    int64_t tokens = 0;
    for (int64_t d = 0; d < set.documents(); ++d) tokens += set.document_tokens(d);
    return tokens;
  }

  static bool uses_second_type(const data::TokenSet& set) {
    for (int64_t d = 0; d < set.documents(); ++d)
      if (set.token_types(d, 0, set.document_tokens(d)).max().item<int64_t>() > 0) return true;
    return false;
  }

  data::TokenSet open(const model::Architecture& architecture,
                      const std::filesystem::path& model) const {
    data::TokenSet set = data::TokenSet::open(file);
    if (!set.is_classification())
      throw UserError(
          fmt::format("{}: is of kind \"{}\" and has no labels for classification; "
                      "prepare it with --format glue",
                      set.path().string(), set.kind()));
    set.require_vocabulary(architecture.vocabulary, model.string());
    const int64_t positions = architecture.position_embedding.empty() ? length_.value_or(INT64_MAX)
                                                                      : architecture.max_positions;
    data::require_rows(set, std::min(length_.value_or(INT64_MAX), positions));
    return set;
  }

  /// [documents * labels] in the order of the documents.
  std::vector<double> score(driver::StageContext& context, const io::Checkpoint& checkpoint,
                            const model::Architecture& architecture, const data::TokenSet& set,
                            const model::SequenceHead& head) const {
    std::vector<int64_t> lengths;
    for (int64_t d = 0; d < set.documents(); ++d) lengths.push_back(set.document_tokens(d));
    const auto units = data::units_by_length(lengths, kUnitTokens);
    UnitWork work{"batches",
                  static_cast<int64_t>(units.size()),
                  std::max(kUnitTokens, lengths[units.front().front()]),
                  {},
                  {}};
    work.input = [&](int64_t unit) {
      const data::SequenceBatch batch = data::sequence_batch(set, units[unit]);
      UnitInput input{batch.tokens.flatten(),
                      {batch.tokens.size(0), batch.tokens.size(1), batch.visible}};
      if (batch.token_types.defined()) input.shape.token_types = batch.token_types.flatten();
      return input;
    };
    const std::vector<at::Tensor> parameters = head.values();
    work.score = [&](int64_t, const UnitInput& input, const at::Tensor& x, const model::Ends&) {
      const at::Tensor out =
          model::sequence_logits(head, parameters, x, input.shape).to(at::kDouble).contiguous();
      return std::vector<double>(out.const_data_ptr<double>(),
                                 out.const_data_ptr<double>() + out.numel());
    };
    const auto scores = score_units(context, checkpoint, architecture, work);
    std::vector<double> logits(static_cast<size_t>(set.documents() * head.labels));
    for (size_t unit = 0; unit < units.size(); ++unit)
      for (size_t i = 0; i < scores[unit].size(); ++i) {
        const int64_t document = units[unit][i / head.labels];
        if (!std::isfinite(scores[unit][i]))
          throw NumericalError(fmt::format("evaluate: a logit of row {} of {} is not finite",
                                           document, set.path().string()));
        logits[document * head.labels + static_cast<int64_t>(i) % head.labels] = scores[unit][i];
      }
    return logits;
  }

  static double mean_loss(const data::TokenSet& set, const std::vector<double>& logits) {
    const int64_t columns = labels_of(set);
    double sum = 0;  // in the order of the rows
    for (int64_t d = 0; d < set.documents(); ++d) {
      const double* row = logits.data() + d * columns;
      if (set.classes() == 0) {
        sum += (row[0] - set.label(d)) * (row[0] - set.label(d));
        continue;
      }
      const double top = *std::max_element(row, row + columns);
      double total = 0;
      for (int64_t c = 0; c < columns; ++c) total += std::exp(row[c] - top);
      sum += std::log(total) + top - row[static_cast<int64_t>(set.label(d))];
    }
    return sum / static_cast<double>(set.documents());
  }

  std::optional<int64_t> length_;
  bool answers_;
};

const MeasurementRegistration registration{
    "classification", [](const config::Section& section) -> std::unique_ptr<Measurement> {
      return std::make_unique<Classification>(section);
    }};

}  // namespace
}  // namespace espalier::evaluate
