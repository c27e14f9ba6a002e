/// The `export` stage: the model as a dense checkpoint that `transformers` loads as it is.

#include <fmt/format.h>

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

class ExportStage : public driver::Stage {
 public:
  explicit ExportStage(const config::Section& section) {
    section.allow({"stage", "from"});
    section.choice("format", {"dense"});
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
    if (directory_) io::require_overwritable(start, target);
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
    return {{fmt::format("dense: {} tensors of {} bytes in {}, into {}", model.names().size(),
                         bytes, run.dtype == at::kFloat ? "float32" : "bfloat16",
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
    const int64_t shards = io::DenseExport(checkpoint, target, context.run.dtype).shards();
    context.progress.start("shards", shards);
    std::vector<std::string> files =
        driver::write_dense(checkpoint, target, context.run.dtype, group, [&](int64_t done) {
          context.progress.advance(done);
          if (done < shards && driver::stop_requested(group))
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
      context.progress.say("exported to " + target.string());
    }
    context.progress.finish();
    return result;
  }

 private:
  std::optional<std::string> directory_;
};

const driver::StageRegistration registration{
    "export", [](const config::Section& section) -> std::unique_ptr<driver::Stage> {
      return std::make_unique<ExportStage>(section);
    }};

}  // namespace
}  // namespace espalier::exporting
