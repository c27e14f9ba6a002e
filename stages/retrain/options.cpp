#include "stages/retrain/options.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

namespace espalier::retrain {

namespace {

/// The keys that other parts of the run read.
const std::vector<std::string> kForeignKeys = {"stage", "from"};

void read_duration(const config::Section& section, RetrainOptions& options) {
  options.epochs = section.optional_number("epochs", {.low = 0, .low_open = true});
  options.steps = section.optional_integer("steps", {.low = 0});
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
  options.head_learning_rate =
      section.optional_number("head_learning_rate", {.low = 0, .low_open = true});
  options.adamw.eps = section.number_or("eps", options.adamw.eps, {.low = 0, .low_open = true});
  options.adamw.weight_decay = section.number_or("weight_decay", 0.0, {.low = 0});
  options.max_grad_norm = section.number_or("max_grad_norm", options.max_grad_norm, {.low = 0});
  options.schedule = section.text_or("schedule", options.schedule);
  const std::vector<std::string> legal = {"linear", "cosine", "constant"};
  if (std::find(legal.begin(), legal.end(), options.schedule) == legal.end())
    section.fail("schedule",
                 fmt::format("'{}' is none of linear, cosine, constant", options.schedule));
}

Merge read_merge(const config::Section& section) {
  const std::string merge = section.text_or("merge", "masked");
  if (merge == "masked") return Merge::masked;
  if (merge == "beside") return Merge::beside;
  if (merge == "dense") return Merge::dense;
  section.fail("merge", fmt::format("'{}' is none of masked, beside, dense", merge));
}

void read_start(const config::Section& section, RetrainOptions& options) {
  const std::string adapter = section.text_or("adapter", "new");
  if (adapter != "new" && adapter != "previous")
    section.fail("adapter", fmt::format("'{}' is none of new, previous", adapter));
  options.adapter_previous = adapter == "previous";
  options.adapter_from = section.optional_text("adapter_from");
  options.index_sets = section.optional_text("index_sets");
  if (options.index_sets == "random" || options.index_sets == "none")
    options.index_sets.reset();  // no file: the method's own affair
  if (options.adapter_previous && options.adapter_from)
    section.fail("adapter_from", "adapter: previous is set too; set one of them");
  if (options.steps == 0 && !options.adapter_previous && !options.adapter_from)
    section.fail("steps",
                 "0 applies a stored adapter without training, and neither adapter_from nor "
                 "adapter: previous names one");
}

void read_validate(const config::Section& section, ValidateOptions& validate) {
  if (section.is_null("validate")) {
    section.allow({"validate"});
    return;
  }
  const config::Section keys = section.child("validate");
  validate.data = keys.optional_text("data");
  validate.share =
      keys.optional_number("share", {.low = 0, .high = 1, .low_open = true, .high_open = true});
  if (validate.data && validate.share)
    keys.fail("share", "validate.data is set too; set one of them to null");
  const auto every = nlohmann::json::parse(keys.canonical()).value("every", nlohmann::json());
  if (!every.is_string())
    validate.every_steps = keys.optional_integer("every", {.low = 1});
  else if (keys.text("every") != "epoch")
    keys.fail("every",
              fmt::format("'{}' is neither epoch nor a number of steps", every.get<std::string>()));
  validate.metric = keys.text_or("metric", validate.metric);
  const std::string keep = keys.text_or("keep", "best");
  if (keep != "best" && keep != "last")
    keys.fail("keep", fmt::format("'{}' is none of best, last", keep));
  validate.keep_best = keep == "best";
  validate.patience = keys.optional_integer("patience", {.low = 1}).value_or(0);
  if (validate.patience > 0 && !validate.wanted())
    keys.fail("patience", "nothing is validated: set validate.data or validate.share");
}

/// What another method reads and this one does not must not be set.
void refuse_keys_of_others(const config::Section& section, const std::string& method) {
  const std::vector<std::string> own = adapter_keys(method);
  if (own.empty()) return;  // an unknown method: the registry says so
  for (const std::string& key : adapter_keys()) {
    if (std::find(own.begin(), own.end(), key) != own.end()) continue;
    section.allow({key});
    if (section.is_null(key) || (key == "dropout" && section.number(key) == 0)) continue;
    section.fail(
        key, fmt::format("method {} does not read it; it reads: {}", method, fmt::join(own, ", ")));
  }
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
  options.merge = read_merge(section);
  read_start(section, options);
  read_validate(section, options.validate);
  section.allow(kForeignKeys);
  refuse_keys_of_others(section, options.method);
  return options;
}

}  // namespace espalier::retrain
