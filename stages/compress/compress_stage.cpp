// The stage `compress`: its keys, its models, its place in a run.
#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/driver/spread.h"
#include "pipeline/driver/stage.h"
#include "pipeline/driver/stage_hooks.h"
#include "pipeline/errors.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/checksum.h"
#include "pipeline/model/added_terms.h"
#include "pipeline/model/sequence_head.h"
#include "stages/compress/compressor.h"
#include "stages/compress/method.h"
#include "stages/compress/pairs.h"
#include "stages/compress/sum.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;
using config::Section;

constexpr const char* kSum = "sum";

struct Options {
  Settings settings;                ///< without dtype and seed, which are the run's
  Summands summands;                ///< of method sum
  std::optional<std::string> base;  ///< PATH, start, ENTRY; none: retrain.input, else start
  std::string fine_tuned = "previous";
  bool from_start = false;  ///< "previous" is the model that the run starts from

  bool sums() const { return settings.method == kSum; }
};

void read_sum(const Section& section, Options& options) {
  refuse_keys(section,
              {"rank", "budget", "allocation", "prior", "bits", "polar", "vectors", "zeros"},
              "sum decodes residuals that are there and compresses nothing");
  if (section.is_null("residuals"))
    section.fail("residuals", "the residuals to add are not given, such as [a/residual.h5, b.h5]");
  for (const std::string& file : section.texts("residuals")) options.summands.files.push_back(file);
  if (options.summands.files.empty()) section.fail("residuals", "the list is empty; name a file");
  if (!section.is_null("weights")) options.summands.weights = section.numbers("weights");
  section.allow({"weights"});
  const size_t weights = options.summands.weights.size();
  if (weights != 0 && weights != options.summands.files.size())
    section.fail("weights", fmt::format("{} numbers are given for {} residuals", weights,
                                        options.summands.files.size()));
  if (options.fine_tuned != "previous")
    section.fail("finetuned", "sum takes no fine-tuned model; leave it at previous");
}

Options read_options(const Section& section) {
  Options options;
  Settings& settings = options.settings;
  std::vector<std::string> methods = method_names();
  methods.push_back(kSum);
  if (!section.is_null("method")) settings.method = section.choice("method", methods);
  options.base = section.optional_text("base");
  options.fine_tuned = section.text_or("finetuned", options.fine_tuned);
  if (options.sums()) {
    read_sum(section, options);
  } else {
    method_of(settings.method).read(section, settings);
    settings.fill_zeros =
        !section.is_null("zeros") && section.choice("zeros", {"keep", "fill"}) == "fill";
    refuse_keys(section, {"residuals", "weights"}, "only compress.method=sum adds residuals");
    if (!section.is_null("vectors") &&
        section.choice("vectors", {"float16", "float32"}) == "float32")
      settings.vectors = at::kFloat;
  }
  options.from_start = section.text_or("from", "") == "start";
  section.allow({"stage", "method", "vectors", "zeros"});
  section.finish();
  return options;
}

/// A checkpoint directory, or a single file of tensors.
bool is_checkpoint(const std::string& name) { return name != "start" && io::is_model_path(name); }

/// A name with a slash can only be meant as a checkpoint: say so before anything runs.
void require_checkpoint_or_entry(const std::string& key, const std::string& name) {
  if (name.find('/') != std::string::npos && !is_checkpoint(name))
    throw UserError(fmt::format(
        "compress.{}: {} is no checkpoint; give a directory or a .safetensors file", key, name));
}

/// A residual is of matrices; what stands beside them would be lost in it.
void refuse_terms(const io::Checkpoint& model) {
  const std::vector<std::string> matrices = model::matrices_with_terms(model);
  if (!matrices.empty())
    throw UserError(fmt::format(
        "{}: an adapter stands beside {} and {} more matrices, and compress takes the difference "
        "of matrices; put a retrain stage with steps: 0, adapter: previous and merge: dense before "
        "it, or name another compress.base",
        model.directory().string(), matrices.front(), matrices.size() - 1));
}

class CompressStage : public driver::Stage {
 public:
  explicit CompressStage(Options options) : options_(std::move(options)) {}

  void check(const driver::RunContext&, const fs::path& start_model) const override {
    if (options_.base) require_checkpoint_or_entry("base", *options_.base);
    if (options_.fine_tuned != "previous" && !is_checkpoint(options_.fine_tuned))
      throw UserError(
          fmt::format("compress.finetuned: {} is no checkpoint; give a directory or a "
                      ".safetensors file, or 'previous'",
                      options_.fine_tuned));
    for (const fs::path& file : options_.summands.files)
      if (!fs::is_regular_file(file))
        throw UserError(fmt::format("compress.residuals: {} is no file", file.string()));
    if (options_.sums()) return;
    // Only these are known before the stages in between have run.
    const auto known = [&](const std::string& name) -> std::optional<fs::path> {
      if (name == "start") return start_model;
      return is_checkpoint(name) ? std::optional<fs::path>(name) : std::nullopt;
    };
    const auto base = known(options_.base.value_or(""));
    const auto fine_tuned = known(options_.fine_tuned != "previous" ? options_.fine_tuned
                                  : options_.from_start             ? "start"
                                                                    : "");
    if (base && fine_tuned)
      require_comparable(io::Checkpoint::open(*base), io::Checkpoint::open(*fine_tuned));
  }

  std::string checksum_of_inputs() const override {
    std::string fingerprints;
    for (const fs::path& file : options_.summands.files)
      fingerprints += io::file_checksum(file) + " ";
    for (const std::string& model : {options_.base.value_or(""), options_.fine_tuned})
      if (model != "previous" && is_checkpoint(model))
        fingerprints += io::Checkpoint::open(model).fingerprint() + " ";
    return fingerprints;
  }

  driver::StagePlan plan(const driver::RunContext&, const fs::path& start_model) const override {
    const std::string base = options_.base.value_or(
        "the model that the last retrain stage took (without an adapter "
        "beside its matrices), else start");
    if (options_.sums())
      return {{fmt::format("sum of {} residuals on {}", options_.summands.files.size(), base)}};
    const Settings& settings = options_.settings;
    const bool given = options_.fine_tuned != "previous";
    const int64_t bytes =
        io::Checkpoint::open(given ? fs::path(options_.fine_tuned) : start_model).bytes();
    std::string size = "every matrix whole";
    if (settings.rank) size = fmt::format("mean truncation rank {}", *settings.rank);
    if (settings.budget)
      size = fmt::format("at most {} bytes ({:.4g} % of a model of {})",
                         static_cast<int64_t>(*settings.budget * static_cast<double>(bytes)),
                         100 * *settings.budget, bytes);
    return {{fmt::format("{}, {} bits: {}", settings.method, settings.bits, size),
             fmt::format("of {} against {}", given ? options_.fine_tuned : "the model it takes",
                         base)}};
  }

  driver::StageResult carry_out(driver::StageContext& context) const override {
    const auto base = io::Checkpoint::open(base_of(context));
    driver::StageResult result;
    result.metrics = options_.sums() ? add(context, base) : compress(context, base);
    result.metrics["base"] = base.directory().string();
    result.model = context.directory / "model";
    return result;
  }

 private:
  nlohmann::json compress(driver::StageContext& context, const io::Checkpoint& base) const {
    const driver::RunContext& run = context.run;
    Settings settings = options_.settings;
    settings.dtype = run.dtype;
    settings.seed = run.seed;
    const auto given = io::Checkpoint::open(
        options_.fine_tuned == "previous" ? context.input_model : fs::path(options_.fine_tuned));
    for (const io::Checkpoint& model : {base, given}) refuse_terms(model);
    // A merged adapter leaves empty terms, which are no tensors of the model.
    const io::Checkpoint fine_tuned = given.without(model::is_term);
    const nlohmann::json metrics =
        compress_model(base, fine_tuned, context.directory, settings, run.group, *run.workers,
                       driver::hooks_of(context));
    context.progress.finish();
    tell(context, metrics);
    return metrics;
  }

  nlohmann::json add(driver::StageContext& context, const io::Checkpoint& base) const {
    refuse_terms(base);
    driver::tensors_checksum(base, context.run.group);  // from now on rank 0 knows it
    const Summands& summands = options_.summands;
    int64_t bytes = 0;
    std::vector<std::string> files;
    for (const fs::path& file : summands.files) {
      bytes += static_cast<int64_t>(fs::file_size(file));
      files.push_back(file.string());
    }
    if (context.run.group.is_root()) {
      write_sum(base, summands, context.directory / "model",
                [&] { context.run.group.still_working(); });
      context.progress.say(fmt::format("{} residuals of {} bytes added", files.size(), bytes));
    }
    context.run.group.barrier();
    return {
        {"method", kSum}, {"residuals", files}, {"weights", summands.weights}, {"bytes", bytes}};
  }

  fs::path base_of(const driver::StageContext& context) const {
    if (options_.base)
      return is_checkpoint(*options_.base) ? fs::path(*options_.base)
                                           : context.model_of(*options_.base);
    try {
      return context.model_of("retrain.input");
    } catch (const UserError&) {  // no stage retrains
      return context.model_of("start");
    }
  }

  static void tell(driver::StageContext& context, const nlohmann::json& metrics) {
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
