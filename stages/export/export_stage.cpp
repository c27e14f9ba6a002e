/// The `export` stage: the model as a dense checkpoint that `transformers` loads as it is.

#include <fmt/format.h>

#include "pipeline/driver/spread.h"
#include "pipeline/driver/stage.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/json.h"
#include "pipeline/model/added_terms.h"
#include "pipeline/model/sequence_head.h"
#include "stages/export/heads.h"
#include "stages/export/terms.h"

namespace espalier::exporting {
namespace {

namespace fs = std::filesystem;

/// A classification head that a stage gave to the model stands in config.json too, so that
/// `transformers` loads the class that has it; that an output embedding is no copy of the token
/// embedding, although config.json said so (not every version compares them); and `more`.
void write_config_keys(const io::Checkpoint& checkpoint, const fs::path& directory,
                       const nlohmann::json& more) {
  if (!model::knows_architecture(checkpoint)) return;
  const model::Architecture architecture = model::read_architecture(checkpoint);
  nlohmann::json keys = more;
  if (const auto of_head = model::config_of_head(checkpoint, architecture)) keys.update(*of_head);
  if (architecture.tied_head && !architecture.head.empty() &&
      architecture.head != architecture.token_embedding)
    keys["tie_word_embeddings"] = false;
  if (keys.empty()) return;
  const fs::path file = directory / "config.json";
  nlohmann::json config = io::parse_json(io::read_file(file), file.string());
  config.update(keys);
  io::write_file(file, config.dump(2) + "\n");
}

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
    io::require_space(target, io::Checkpoint::open(start_model).bytes());
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
      write_config_keys(checkpoint, target, heads.config_keys);
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
