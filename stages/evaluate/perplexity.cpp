/// Perplexity: exp of the mean negative log-likelihood over consecutive segments, no overlap, every
/// predicted token counted once; the tail that fills no segment is dropped.

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>
#include <optional>

#include "pipeline/data/sampler.h"
#include "pipeline/data/token_set.h"
#include "pipeline/errors.h"
#include "pipeline/train/cross_entropy.h"
#include "stages/evaluate/measurement.h"
#include "stages/evaluate/score_units.h"

namespace espalier::evaluate {
namespace {

/// Every label is the next token; the last position predicts nothing.
at::Tensor next_tokens(const at::Tensor& tokens) {
  at::Tensor labels = at::full_like(tokens, data::kIgnored);
  labels.narrow(0, 0, tokens.size(0) - 1).copy_(tokens.narrow(0, 1, tokens.size(0) - 1));
  return labels;
}

class Perplexity : public Measurement {
 public:
  explicit Perplexity(const config::Section& section)
      : length_(section.integer_or("sequence_length", 2048, {.low = 2, .high = 1e6})),
        segments_(section.optional_integer("segments", {.low = 1})) {
    refuse_key(section, "shots", "multiple_choice");
  }

  void check(const driver::RunContext&, const model::Architecture& architecture,
             const std::filesystem::path& start_model) const override {
    require_language_model(architecture, start_model, "perplexity");
    model::require_positions(architecture, length_,
                             fmt::format("evaluate.tasks.{}.sequence_length", name),
                             start_model.string());
    const data::TokenSet set = data::TokenSet::open(file);
    set.require_vocabulary(architecture.vocabulary, start_model.string());
    segments_of(set);
  }

  nlohmann::json measure(driver::StageContext& context, const io::Checkpoint& checkpoint,
                         const model::Architecture& architecture,
                         const model::TensorCounts& counts) const override {
    const data::TokenSet set = data::TokenSet::open(file);
    set.require_vocabulary(architecture.vocabulary, context.input_model.string());
    const int64_t segments = segments_of(set);
    UnitWork work{"segments", segments, length_, {}, {}};
    work.input = [&](int64_t segment) {
      return UnitInput{set.stream(segment * length_, length_), {1, length_, {}}};
    };
    work.score = [&](int64_t, const UnitInput& input, const at::Tensor& x,
                     const model::Ends& ends) {
      return std::vector{
          train::loss_sum(x, ends.head, next_tokens(input.tokens), false, false, ends.head_bias)
              .loss};
    };
    const auto losses = score_units(context, checkpoint, architecture, work);
    double sum = 0;  // in the order of the segments, whoever computed them
    for (int64_t segment = 0; segment < segments; ++segment) {
      if (!std::isfinite(losses[segment][0]))
        throw NumericalError(fmt::format("evaluate: the loss of segment {} of {} is not finite",
                                         segment, set.path().string()));
      sum += losses[segment][0];
    }
    const int64_t tokens = segments * (length_ - 1);
    const double mean_loss = sum / static_cast<double>(tokens), perplexity = std::exp(mean_loss);
    context.progress.say(fmt::format("{}: perplexity {:.3f} ({} segments of {})", name, perplexity,
                                     segments, length_));
    context.progress.metric({{"task", name}, {"perplexity", perplexity}});
    nlohmann::json row = {
        {"kind", "perplexity"},       {"reported", nlohmann::json::array({"perplexity"})},
        {"perplexity", perplexity},   {"mean_loss", mean_loss},
        {"tokens", tokens},           {"segments", segments},
        {"sequence_length", length_}, {"data_checksum", set.checksum()}};
    add_flops(row, {architecture, counts, output_embedding(architecture, counts)},
              {ScoredSequence{length_, length_ - 1}});
    return row;
  }

  std::string plan() const override {
    return fmt::format("perplexity of {} segments of {} tokens",
                       segments_of(data::TokenSet::open(file)), length_);
  }

 private:
  /// How many segments are scored. Throws UserError when the set has fewer than asked, or none.
  int64_t segments_of(const data::TokenSet& set) const {
    const int64_t whole = set.stream_tokens() / length_;
    if (whole == 0 || (segments_ && *segments_ > whole))
      throw UserError(fmt::format(
          "{}: {} tokens give {} segments of {}; {} are asked for. Lower segments or "
          "sequence_length, or give more text",
          set.path().string(), set.stream_tokens(), whole, length_, segments_.value_or(1)));
    return segments_.value_or(whole);
  }

  int64_t length_;
  std::optional<int64_t> segments_;
};

const MeasurementRegistration registration{
    "perplexity", [](const config::Section& section) -> std::unique_ptr<Measurement> {
      return std::make_unique<Perplexity>(section);
    }};

}  // namespace
}  // namespace espalier::evaluate
