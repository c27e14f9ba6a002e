#include "stages/retrain/options.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

namespace espalier::retrain {

namespace {

/// The keys of methods and of parts of the run that read them elsewhere.
const std::vector<std::string> kForeignKeys = {
    "stage",    "from", "dropout",      "row_groups",  "scale",      "beta",
    "residual", "init", "adapter_rank", "alpha",       "mask",       "subspace",
    "sigma",    "side", "blocks",       "cardinality", "index_sets", "start_norm"};

void read_duration(const config::Section& section, RetrainOptions& options) {
  options.epochs = section.optional_number("epochs", {.low = 0, .low_open = true});
  options.steps = section.optional_integer("steps", {.low = 1});
  if (!options.epochs && !options.steps)
    section.fail("steps", "neither steps nor epochs is set; set one of them");
  options.warmup_steps = section.optional_integer("warmup_steps", {.low = 0});
  const auto ratio = section.optional_number("warmup_ratio", {.low = 0, .high = 1});
  if (options.warmup_steps && ratio)
    section.fail("warmup_steps", "warmup_ratio is set too; set one of them to null");
  options.warmup_ratio = ratio.value_or(0.0);
}

void read_batch(const config::Section& section, RetrainOptions& options) {
  options.batch_size = section.integer_or("batch_size", options.batch_size, {.low = 1});
  options.micro_batch_size =
      section.integer_or("micro_batch_size", options.micro_batch_size, {.low = 1});
  if (options.batch_size % options.micro_batch_size != 0)
    section.fail("batch_size", fmt::format("{} is not a multiple of micro_batch_size = {}",
                                           options.batch_size, options.micro_batch_size));
  options.sequence_length =
      section.integer_or("sequence_length", options.sequence_length, {.low = 2});
}

void read_optimizer(const config::Section& section, RetrainOptions& options) {
  options.learning_rate = section.number("learning_rate", {.low = 0, .low_open = true});
  if (!section.is_null("betas")) {
    const std::vector<double> betas =
        section.numbers("betas", {.low = 0, .high = 1, .high_open = true});
    if (betas.size() != 2)
      section.fail("betas", fmt::format("{} numbers are given, AdamW has two", betas.size()));
    options.adamw.beta1 = betas[0];
    options.adamw.beta2 = betas[1];
  }
  options.adamw.eps = section.number_or("eps", options.adamw.eps, {.low = 0, .low_open = true});
  options.adamw.weight_decay = section.number_or("weight_decay", 0.0, {.low = 0});
  options.max_grad_norm = section.number_or("max_grad_norm", options.max_grad_norm, {.low = 0});
  options.schedule = section.text_or("schedule", options.schedule);
  const std::vector<std::string> legal = {"linear", "cosine", "constant"};
  if (std::find(legal.begin(), legal.end(), options.schedule) == legal.end())
    section.fail("schedule",
                 fmt::format("'{}' is none of linear, cosine, constant", options.schedule));
}

void refuse(const config::Section& section, const std::string& key, const std::string& why) {
  if (!section.is_null(key)) section.fail(key, why + "; set it to null");
}

void refuse_unsupported(const config::Section& section, const std::string& method) {
  refuse(section, "head_learning_rate",
         fmt::format("{} of a causal language model trains no head of its own", method));
  refuse(section, "adapter_from", "starting from a stored adapter is not supported");
  const std::string adapter = section.text_or("adapter", "new");
  if (adapter != "new")
    section.fail("adapter", fmt::format("'{}' is not supported; only 'new' is", adapter));
  if (section.is_null("validate")) {
    section.allow({"validate"});
    return;
  }
  const config::Section validate = section.child("validate");
  for (const char* key : {"data", "share"})
    refuse(validate, key, "validation during retraining is not supported; evaluate is a stage");
  validate.allow({"data", "share", "every", "metric", "keep", "patience"});
}

}  // namespace

int64_t RetrainOptions::total_steps(int64_t epoch_sequences) const {
  if (steps) return *steps;
  const double sequences = *epochs * static_cast<double>(epoch_sequences);
  return std::max<int64_t>(
      1, static_cast<int64_t>(std::ceil(sequences / static_cast<double>(batch_size))));
}

RetrainOptions read_options(const config::Section& section) {
  RetrainOptions options;
  options.method = section.text("method");
  if (!section.is_null("targets")) options.targets = section.texts("targets");
  read_duration(section, options);
  read_batch(section, options);
  read_optimizer(section, options);
  options.checkpoint_every = section.integer_or("checkpoint_every", 0, {.low = 0});
  options.activation_checkpointing = section.flag_or("activation_checkpointing", false);
  options.train_on_prompt = section.flag_or("train_on_prompt", options.train_on_prompt);
  options.merge = section.text_or("merge", options.merge);
  if (options.merge == "beside")
    section.fail("merge", "'beside' is not supported; masked merges and keeps every zero");
  if (options.merge != "masked" && options.merge != "dense")
    section.fail("merge", fmt::format("'{}' is none of masked, beside, dense", options.merge));
  refuse_unsupported(section, options.method);
  section.allow(kForeignKeys);
  return options;
}

}  // namespace espalier::retrain
