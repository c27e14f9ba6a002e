// The stage `compress`: its keys, its models, its place in a run.
#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/driver/stage.h"
#include "pipeline/errors.h"
#include "pipeline/model/added_terms.h"
#include "stages/compress/compressor.h"
#include "stages/compress/pairs.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;
using config::Range;
using config::Section;

struct Options {
  Settings settings;                ///< without dtype and seed, which are the run's
  std::optional<std::string> base;  ///< DIR, start, ENTRY; none: what the last retrain stage took
  std::string fine_tuned = "previous";
};

/// The value of a key that may be left out, or null, for `otherwise`.
std::string choice_or(const Section& section, const std::string& key, const std::string& otherwise,
                      const std::vector<std::string>& legal) {
  return section.is_null(key) ? otherwise : section.choice(key, legal);
}

Options read_options(const Section& section) {
  Options options;
  Settings& settings = options.settings;
  choice_or(section, "method", "ere", {"ere"});
  settings.rank = section.optional_integer("rank", {1, 1 << 20});
  settings.budget = section.optional_number("budget", {0, 1, true, false});
  if (settings.rank && settings.budget)
    section.fail("budget", "rank and budget are both set; set one of them to null");
  if (!settings.rank && !settings.budget)
    section.fail(
        "rank",
        "neither rank nor budget is set: give the mean truncation rank (compress.rank=64) or "
        "the share of the fine-tuned checkpoint's bytes (compress.budget=0.05)");
  settings.bits = section.integer_or("bits", settings.bits, {1, 8});
  settings.allocation =
      choice_or(section, "allocation", settings.allocation, {"uniform", "paper", "greedy"});
  settings.prior = section.number_or("prior", settings.prior, {0, 1});
  settings.polar = section.flag_or("polar", settings.polar);
  const std::string vectors = choice_or(section, "vectors", "float16", {"float16", "float32"});
  settings.vectors = vectors == "float16" ? at::kHalf : at::kFloat;
  options.base = section.optional_text("base");
  options.fine_tuned = section.text_or("finetuned", options.fine_tuned);
  section.allow({"stage", "from", "method", "allocation", "vectors"});
  section.finish();
  return options;
}

bool is_directory(const std::string& name) {
  std::error_code error;
  return name != "start" && fs::is_directory(name, error);
}

/// A name with a slash can only be meant as a directory: say so before anything runs.
void require_directory_or_entry(const std::string& key, const std::string& name) {
  if (name.find('/') != std::string::npos && !is_directory(name))
    throw UserError(fmt::format("compress.{}: {} is no directory; give a checkpoint", key, name));
}

/// A residual is of matrices; what stands beside them would be lost in it.
void refuse_terms(const io::Checkpoint& model) {
  const std::vector<std::string> matrices = model::matrices_with_terms(model);
  if (!matrices.empty())
    throw UserError(fmt::format(
        "{}: an adapter stands beside {} and {} more matrices, and compress takes the difference "
        "of "
        "matrices; put a retrain stage with steps: 0, adapter: previous and merge: dense before it",
        model.directory().string(), matrices.front(), matrices.size() - 1));
}

class CompressStage : public driver::Stage {
 public:
  explicit CompressStage(Options options) : options_(std::move(options)) {}

  void check(const driver::RunContext&, const fs::path& start_model) const override {
    if (options_.base) require_directory_or_entry("base", *options_.base);
    if (options_.fine_tuned != "previous" && !is_directory(options_.fine_tuned))
      throw UserError(
          fmt::format("compress.finetuned: {} is no directory; give a checkpoint, or 'previous'",
                      options_.fine_tuned));
    const bool base_given = options_.base && is_directory(*options_.base);
    const bool fine_tuned_given = options_.fine_tuned != "previous";
    if (!base_given && !fine_tuned_given) return;
    const auto start = io::Checkpoint::open(start_model);
    const auto base = base_given ? io::Checkpoint::open(*options_.base) : start;
    require_comparable(base, fine_tuned_given ? io::Checkpoint::open(options_.fine_tuned) : start);
  }

  std::string checksum_of_inputs() const override {
    std::string fingerprints;
    for (const std::string& model : {options_.base.value_or(""), options_.fine_tuned})
      if (model != "previous" && is_directory(model))
        fingerprints += io::Checkpoint::open(model).fingerprint() + " ";
    return fingerprints;
  }

  driver::StageResult carry_out(driver::StageContext& context) const override {
    const driver::RunContext& run = context.run;
    Settings settings = options_.settings;
    settings.dtype = run.dtype;
    settings.seed = run.seed;
    const auto base = io::Checkpoint::open(base_of(context));
    const auto fine_tuned = io::Checkpoint::open(
        options_.fine_tuned == "previous" ? context.input_model : fs::path(options_.fine_tuned));
    for (const io::Checkpoint& model : {base, fine_tuned}) refuse_terms(model);
    const Hooks hooks{[&](const std::string& what, int64_t total, int64_t done) {
                        context.progress.start(what, total, done);
                      },
                      [&](int64_t done) { context.progress.advance(done); },
                      [&] { return driver::stop_requested(run.group); }};
    driver::StageResult result;
    result.metrics = compress_model(base, fine_tuned, context.directory, settings, run.group,
                                    *run.workers, hooks);
    result.metrics["base"] = base.directory().string();
    result.model = context.directory / "model";
    context.progress.finish();
    tell(context, result.metrics);
    return result;
  }

 private:
  fs::path base_of(const driver::StageContext& context) const {
    if (options_.base)
      return is_directory(*options_.base) ? fs::path(*options_.base)
                                          : context.model_of(*options_.base);
    try {
      return context.model_of("retrain.input");
    } catch (const UserError&) {  // no stage retrains
      return context.model_of("start");
    }
  }

  void tell(driver::StageContext& context, const nlohmann::json& metrics) const {
    if (!context.run.group.is_root()) return;
    context.progress.say(fmt::format(
        "residual.h5: {} bytes, {:.2f} % of the fine-tuned tensors; {} matrices, {} of them inside "
        "their mask",
        metrics["bytes"].get<int64_t>(), 100 * metrics["share"].get<double>(),
        metrics["matrices"].size(), metrics["mask_preserving"].get<int64_t>()));
    context.progress.metric({{"bytes", metrics["bytes"]}, {"share", metrics["share"]}});
  }

  Options options_;
};

const driver::StageRegistration registration{
    "compress",
    [](const Section& section) { return std::make_unique<CompressStage>(read_options(section)); }};

}  // namespace
}  // namespace espalier::compress
