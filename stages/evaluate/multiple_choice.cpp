/// Multiple choice as EleutherAI's harness has it: the choice whose text the model finds likeliest
/// behind its context, by the summed log-likelihood (accuracy), by that divided by the choice's
/// characters (accuracy_by_characters, the harness's acc_norm) and by its tokens. Equals go to the
/// first choice. What a question's rows begin with alike, its prompt as a rule, is computed once.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "pipeline/data/sampler.h"
#include "pipeline/data/sequence_batch.h"
#include "pipeline/data/token_set.h"
#include "pipeline/errors.h"
#include "pipeline/train/cross_entropy.h"
#include "stages/evaluate/answers.h"
#include "stages/evaluate/measurement.h"
#include "stages/evaluate/score_units.h"

namespace espalier::evaluate {
namespace {

constexpr int64_t kUnitTokens = 1024;

/// A row: its last `length` tokens, of which the last is only predicted. The first `unscored` of
/// them are not scored.
struct Row {
  int64_t begin = 0, length = 0, scored = 0, unscored = 0;
};

/// Rows from `first` on as branches of one tree.
struct Rows {
  int64_t first = 0;
  model::SequenceTree tree;
};

class MultipleChoice : public Measurement {
 public:
  explicit MultipleChoice(const config::Section& section)
      : length_(section.integer_or("sequence_length", 2048, {.low = 2, .high = 1e6})),
        shots_(section.integer_or("shots", 0, {.low = 0, .high = 1000})),
        answers_(section.flag_or("answers", false)) {
    refuse_key(section, "segments", "perplexity");
  }

  void check(const driver::RunContext&, const model::Architecture& architecture,
             const std::filesystem::path& start_model) const override {
    require_language_model(architecture, start_model, "multiple_choice");
    rows_of(open(architecture, start_model));
  }

  nlohmann::json measure(driver::StageContext& context, const io::Checkpoint& checkpoint,
                         const model::Architecture& architecture,
                         const model::TensorCounts& counts) const override {
    const data::TokenSet set = open(architecture, context.input_model);
    const std::vector<Row> rows = rows_of(set);
    const std::vector<double> likelihoods = score(context, checkpoint, architecture, set, rows);
    const int64_t questions = set.questions();
    const auto share = [&](const std::function<double(int64_t)>& value) {
      int64_t right = 0;
      for (int64_t q = 0; q < questions; ++q)
        right += best(set, q, value) == static_cast<int64_t>(set.label(q));
      return static_cast<double>(right) / static_cast<double>(questions);
    };
    const auto divided = [&](auto&& by) {
      return [&, by](int64_t row) { return likelihoods[row] / static_cast<double>(by(row)); };
    };
    const double plain = share([&](int64_t row) { return likelihoods[row]; });
    const double by_characters = share(divided([&](int64_t row) { return set.characters(row); }));
    const double by_tokens = share(divided([&](int64_t row) { return rows[row].scored; }));
    int64_t tokens = 0, cut = 0;
    for (size_t row = 0; row < rows.size(); ++row) {
      tokens += rows[row].scored;
      cut += rows[row].begin > 0;
    }
    nlohmann::json result = {
        {"kind", "multiple_choice"},
        {"reported", nlohmann::json::array({"accuracy", "accuracy_by_characters"})},
        {"accuracy", plain},
        {"accuracy_by_characters", by_characters},
        {"accuracy_by_tokens", by_tokens},
        {"standard_error", std::sqrt(plain * (1 - plain) / std::max<double>(1, questions - 1.0))},
        {"questions", questions},
        {"choices", set.documents()},
        {"tokens", tokens},
        {"rows_cut", cut},
        {"shots", set.shots()},
        {"sequence_length", length_},
        {"data_checksum", set.checksum()}};
    std::vector<ScoredSequence> sequences;
    for (const Row& row : rows) sequences.push_back({row.length - 1, row.scored});
    add_flops(result, {architecture, counts, output_embedding(architecture, counts)}, sequences);
    if (answers_)
      result["answers"] = write_answers(context, name, questions, [&](int64_t q) {
        const auto first = likelihoods.begin() + set.first_choice(q);
        return nlohmann::json{
            {"question", q},
            {"label", set.label(q)},
            {"log_likelihoods",
             std::vector<double>(first, likelihoods.begin() + set.first_choice(q + 1))}};
      });
    context.progress.say(
        fmt::format("{}: accuracy {:.4f}, by characters {:.4f}, by tokens {:.4f} ({} questions)",
                    name, plain, by_characters, by_tokens, questions));
    if (cut > 0)
      context.progress.say(
          fmt::format("{}: {} rows are longer than sequence_length {} and lost their beginning",
                      name, cut, length_));
    context.progress.metric({{"task", name},
                             {"accuracy", plain},
                             {"accuracy_by_characters", by_characters},
                             {"accuracy_by_tokens", by_tokens}});
    return result;
  }

  std::string numerics() const override { return "multiple_choice 2 "; }

  std::string plan() const override {
    const data::TokenSet set = data::TokenSet::open(file);
    return fmt::format("accuracy in {} questions, {} choices", set.questions(), set.documents());
  }

 private:
  data::TokenSet open(const model::Architecture& architecture,
                      const std::filesystem::path& model) const {
    data::TokenSet set = data::TokenSet::open(file);
    if (set.questions() == 0)
      throw UserError(
          fmt::format("{}: is of kind \"{}\" and has no questions; prepare it with "
                      "--format choices",
                      set.path().string(), set.kind()));
    if (set.shots() != shots_)
      throw UserError(
          fmt::format("{}: was prepared with {} shots, evaluate.tasks.{}.shots asks for {}; the "
                      "solved examples "
                      "are part of the tokens: prepare it with --shots {}",
                      set.path().string(), set.shots(), name, shots_, shots_));
    set.require_vocabulary(architecture.vocabulary, model.string());
    model::require_positions(architecture, length_,
                             fmt::format("evaluate.tasks.{}.sequence_length", name),
                             model.string());
    return set;
  }

  /// Too long a row loses its beginning, as in the harness; the choice itself must fit.
  std::vector<Row> rows_of(const data::TokenSet& set) const {
    std::vector<Row> rows;
    for (int64_t d = 0; d < set.documents(); ++d) {
      const int64_t whole = set.document_tokens(d);
      // The last token is only predicted, so a row holds one more than the model reads.
      Row row{std::max<int64_t>(0, whole - length_ - 1), 0, 0};
      row.length = whole - row.begin;
      const at::Tensor counts = set.loss_mask(d, 0, whole);
      row.scored = counts.sum().item<int64_t>();
      row.unscored = (counts.narrow(0, row.begin, row.length).cumsum(0) == 0).sum().item<int64_t>();
      if (row.scored < 1 || row.length < 2 || counts.narrow(0, 0, row.begin + 1).any().item<bool>())
        throw UserError(fmt::format(
            "{}: row {} of {} tokens scores {}: a choice needs a token, something before it, and "
            "room in sequence_length {}",
            set.path().string(), d, whole, row.scored, length_));
      rows.push_back(row);
    }
    return rows;
  }

  /// Rows [first, last) without their last tokens, as one tree. The trunk ends before any row's
  /// scores begin: its last token predicts another one in each branch.
  static Rows rows_as_tree(const data::TokenSet& set, const std::vector<Row>& rows, int64_t first,
                           int64_t last) {
    const auto begin_of = [&](int64_t row, int64_t count) {
      return set.document(row, rows[row].begin, count);
    };
    model::SequenceTree tree{rows[first].unscored - 1, {}};
    for (int64_t row = first + 1; row < last; ++row) {
      const int64_t shared = std::min(tree.trunk, rows[row].unscored - 1);
      const at::Tensor alike = begin_of(first, shared) == begin_of(row, shared);
      tree.trunk = alike.cumprod(0).sum().item<int64_t>();
    }
    for (int64_t row = first; row < last; ++row)
      tree.branches.push_back(rows[row].length - 1 - tree.trunk);
    return {first, std::move(tree)};
  }

  /// A question as one tree, or, where that has more than a unit's tokens and twice the longest
  /// row's (long rows that share little), each of its rows as its own.
  static void add_question(const data::TokenSet& set, const std::vector<Row>& rows,
                           int64_t question, std::vector<Rows>& all) {
    const int64_t first = set.first_choice(question), last = set.first_choice(question + 1);
    Rows whole = rows_as_tree(set, rows, first, last);
    if (whole.tree.rows() <= std::max(kUnitTokens, 2 * whole.tree.longest())) {
      all.push_back(std::move(whole));
      return;
    }
    for (int64_t row = first; row < last; ++row)
      all.push_back(rows_as_tree(set, rows, row, row + 1));
  }

  /// Every row's summed log-likelihood of its scored tokens.
  std::vector<double> score(driver::StageContext& context, const io::Checkpoint& checkpoint,
                            const model::Architecture& architecture, const data::TokenSet& set,
                            const std::vector<Row>& rows) const {
    std::vector<Rows> all;
    for (int64_t question = 0; question < set.questions(); ++question)
      add_question(set, rows, question, all);
    std::vector<int64_t> tokens;
    for (const Rows& one : all) tokens.push_back(one.tree.rows());
    const auto units = data::units_by_length(tokens, kUnitTokens, /*padded=*/false);
    UnitWork work{"batches",
                  static_cast<int64_t>(units.size()),
                  std::max(kUnitTokens, tokens[units.front().front()]),
                  {},
                  {}};
    work.input = [&](int64_t unit) {
      UnitInput input;
      std::vector<at::Tensor> parts;
      for (const int64_t index : units[unit]) {
        const auto& [first, tree] = all[index];
        parts.push_back(set.document(first, rows[first].begin, tree.trunk));
        for (size_t i = 0; i < tree.branches.size(); ++i) {
          const auto row = first + static_cast<int64_t>(i);
          parts.push_back(set.document(row, rows[row].begin + tree.trunk, tree.branches[i]));
        }
        input.shape.trees.push_back(tree);
        input.shape.length = std::max(input.shape.length, tree.longest());
      }
      input.tokens = at::cat(parts);
      return input;
    };
    work.score = [&](int64_t unit, const UnitInput&, const at::Tensor& x, const model::Ends& ends) {
      std::vector<at::Tensor> labels;
      for (const int64_t index : units[unit]) {
        const auto& [first, tree] = all[index];
        labels.push_back(at::full({tree.trunk}, data::kIgnored, at::kLong));
        for (size_t i = 0; i < tree.branches.size(); ++i) {
          const auto row = first + static_cast<int64_t>(i);
          const int64_t next = rows[row].begin + tree.trunk + 1, count = tree.branches[i];
          labels.push_back(
              set.document(row, next, count)
                  .masked_fill(set.loss_mask(row, next, count).logical_not(), data::kIgnored));
        }
      }
      const at::Tensor losses = train::token_losses(x, ends.head, at::cat(labels), ends.head_bias);
      const double* loss = losses.const_data_ptr<double>();
      std::vector<double> sums;
      for (const int64_t index : units[unit]) {
        loss += all[index].tree.trunk;
        for (const int64_t count : all[index].tree.branches) {
          sums.push_back(-std::accumulate(loss, loss + count, 0.0));
          loss += count;
        }
      }
      return sums;
    };
    const auto scores = score_units(context, checkpoint, architecture, work);
    std::vector<double> likelihoods(rows.size());
    for (size_t unit = 0; unit < units.size(); ++unit) {
      auto score = scores[unit].begin();
      for (const int64_t index : units[unit])
        for (size_t i = 0; i < all[index].tree.branches.size(); ++i, ++score) {
          const int64_t row = all[index].first + static_cast<int64_t>(i);
          if (!std::isfinite(*score))
            throw NumericalError(
                fmt::format("evaluate: the log-likelihood of row {} of {} is not finite", row,
                            set.path().string()));
          likelihoods[row] = *score;
        }
    }
    return likelihoods;
  }

  /// The choice of the largest value, the first of equals.
  static int64_t best(const data::TokenSet& set, int64_t question,
                      const std::function<double(int64_t)>& value) {
    const int64_t first = set.first_choice(question), last = set.first_choice(question + 1);
    int64_t winner = first;
    for (int64_t row = first + 1; row < last; ++row)
      if (value(row) > value(winner)) winner = row;
    return winner - first;
  }

  int64_t length_, shots_;
  bool answers_;
};

const MeasurementRegistration registration{
    "multiple_choice", [](const config::Section& section) -> std::unique_ptr<Measurement> {
      return std::make_unique<MultipleChoice>(section);
    }};

}  // namespace
}  // namespace espalier::evaluate
