/// The `export` stage: the model as a dense checkpoint that `transformers` loads as it is, or with
/// its zeros packed (pipeline/io/packed_tensor.h), which espalier and launch/unpack.py read.

#include <fmt/format.h>

#include <cmath>
#include <map>

#include "pipeline/driver/spread.h"
#include "pipeline/driver/stage.h"
#include "pipeline/errors.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/added_terms.h"
#include "pipeline/model/config_keys.h"
#include "pipeline/model/heads.h"
#include "stages/export/heads.h"
#include "stages/export/terms.h"

namespace espalier::exporting {
namespace {

namespace fs = std::filesystem;

const std::map<std::string, io::PackFormat> kFormats = {{"dense", io::PackFormat::dense},
                                                        {"bitmask", io::PackFormat::bitmask},
                                                        {"nm", io::PackFormat::nm}};

/// What packing saved: bytes of all tensors as stored, dense, and at least (what is stored as it is
/// counts as it is in each).
nlohmann::json sizes_of(const io::Checkpoint& exported) {
  std::map<std::string, int64_t> packed;
  int64_t stored = 0;
  double bound = 0;
  for (const std::string& name : exported.names()) {
    const io::Packing* packing = exported.packing(name);
    const int64_t dense = exported.info(name).bytes();
    stored += packing != nullptr ? packing->bytes() : dense;
    bound += packing != nullptr ? packing->bound_bits() / 8 : static_cast<double>(dense);
    if (packing != nullptr) ++packed[packing->name()];
  }
  const auto share_of = [&](double bytes) { return bytes > 0 ? double(stored) / bytes : 1.0; };
  return {{"packed", packed},
          {"tensor_bytes", stored},
          {"dense_bytes", exported.bytes()},
          {"bound_bytes", static_cast<int64_t>(std::ceil(bound))},
          {"share_of_dense", share_of(double(exported.bytes()))},
          {"share_of_bound", share_of(bound)}};
}

std::string sentence_of(const nlohmann::json& sizes) {
  std::string packed;
  for (const auto& [name, count] : sizes["packed"].items())
    packed += fmt::format("{}{} as {}", packed.empty() ? "" : ", ", count.get<int64_t>(), name);
  return fmt::format(
      "tensors packed: {}; {} bytes are {:.1f} % of {} dense and {:.1f} % of {}, the entropy bound",
      packed.empty() ? "none, as that saves nothing" : packed, sizes["tensor_bytes"].get<int64_t>(),
      100 * sizes["share_of_dense"].get<double>(), sizes["dense_bytes"].get<int64_t>(),
      100 * sizes["share_of_bound"].get<double>(), sizes["bound_bytes"].get<int64_t>());
}

class ExportStage : public driver::Stage {
 public:
  explicit ExportStage(const config::Section& section) {
    section.allow({"stage", "from"});
    format_ = section.choice("format", {"dense", "bitmask", "nm"});
    directory_ = section.optional_text("directory");
  }

  void check(const driver::RunContext& run, const fs::path& start_model) const override {
    if (!run.group.is_root()) return;
    const fs::path target = directory_ ? fs::path(*directory_) : run.directory;
    if (directory_ && fs::exists(target) && fs::equivalent(target, start_model))
      throw UserError(
          fmt::format("export.directory: {} is the model the run starts from; choose "
                      "another directory",
                      target.string()));
    const io::Checkpoint start = io::Checkpoint::open(start_model);
    if (directory_) require_overwritable(start);
    io::require_space(target, start.bytes());
  }

  driver::StagePlan plan(const driver::RunContext& run,
                         const fs::path& start_model) const override {
    const io::Checkpoint model = io::Checkpoint::open(start_model);
    const fs::path target = directory_ ? fs::path(*directory_) : run.directory;
    int64_t bytes = 0;
    for (const auto& name : model.names()) {
      const io::TensorInfo& info = model.info(name);
      const bool cast = at::isFloatingType(info.dtype);
      bytes += info.bytes() / static_cast<int64_t>(c10::elementSize(info.dtype)) *
               static_cast<int64_t>(c10::elementSize(cast ? run.dtype : info.dtype));
    }
    return {
        {fmt::format("{}: {} tensors of {} bytes in {}{}, into {}", format_, model.names().size(),
                     bytes, run.dtype == at::kFloat ? "float32" : "bfloat16",
                     format_ == "dense" ? "" : " before they are packed",
                     directory_ ? target.string() : "its own directory")}};
  }

  driver::StageResult carry_out(driver::StageContext& context) const override {
    const comm::Communicator& group = context.run.group;
    const fs::path target = directory_ ? fs::path(*directory_) : context.directory / "model";
    driver::StageResult result{target, {}};
    const HeadsExport heads = export_heads(context, io::Checkpoint::open(context.input_model));
    const io::Checkpoint& model = heads.model;
    if (!heads.sentence.empty()) context.progress.say(heads.sentence);
    const io::Checkpoint checkpoint = model.without(model::is_term);
    const io::ModelExport whole(checkpoint, target, context.run.dtype, io::kShardBytes,
                                kFormats.at(format_));
    // Another program may have written there since the run began.
    if (directory_ && group.is_root()) require_overwritable(checkpoint);
    context.progress.start("shards", whole.shards());
    std::vector<std::string> files = driver::write_export(whole, group, [&](int64_t done) {
      context.progress.advance(done);
      if (done < whole.shards() && driver::stop_requested(group))
        throw Requeue("export: stopped; the same command again writes the model anew");
    });
    const Terms terms = write_terms(model, target, group.is_root());
    files.insert(files.end(), terms.files.begin(), terms.files.end());
    if (!terms.sentence.empty()) context.progress.say(terms.sentence);
    if (directory_) result.files_elsewhere = files;
    if (group.is_root()) {
      fs::remove(target / model::kHeadsFile);  // an earlier decoding's
      nlohmann::json keys = model::config_of_tensors(checkpoint);
      keys.update(heads.config_keys);
      model::set_config_keys(target, keys);
      int64_t bytes = 0;
      for (const auto& name : files) bytes += static_cast<int64_t>(fs::file_size(target / name));
      result.metrics = {{"directory", target.string()}, {"bytes", bytes}, {"files", files.size()}};
      if (format_ != "dense") {
        const nlohmann::json sizes = sizes_of(io::Checkpoint::open(target));
        result.metrics.update(sizes);
        context.progress.say(sentence_of(sizes));
      }
      context.progress.say("exported to " + target.string());
    }
    context.progress.finish();
    return result;
  }

 private:
  std::string format_;
  void require_overwritable(const io::Checkpoint& model) const {
    for (const fs::path& target : {fs::path(*directory_), fs::path(*directory_) / kAdapterFolder})
      io::require_overwritable(model, target);
  }

  std::optional<std::string> directory_;
};

const driver::StageRegistration registration{
    "export", [](const config::Section& section) -> std::unique_ptr<driver::Stage> {
      return std::make_unique<ExportStage>(section);
    }};

}  // namespace
}  // namespace espalier::exporting
