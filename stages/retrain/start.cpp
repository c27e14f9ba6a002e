#include "stages/retrain/start.h"

#include <fmt/format.h>

#include "pipeline/driver/spread.h"
#include "pipeline/errors.h"
#include "pipeline/model/added_terms.h"

namespace espalier::retrain {

namespace {

namespace fs = std::filesystem;

fs::path previous_file(const io::Checkpoint& model) {
  if (model::matrices_with_terms(model).empty())
    throw UserError(fmt::format(
        "retrain.adapter: previous, but no adapter stands beside the matrices of {}: the retrain "
        "stage before must end with merge: beside",
        model.directory().string()));
  const fs::path file = train::adapters_beside(model);
  if (file.empty())
    throw UserError(fmt::format(
        "retrain.adapter: previous, but the stage that wrote what stands beside the matrices of {} "
        "holds no adapters.h5",
        model.directory().string()));
  return file;
}

}  // namespace

fs::path adapter_file_of(const std::string& adapter_from) {
  const fs::path path = adapter_from;
  return fs::is_directory(path) ? path / "adapters.h5" : path;
}

Start find_start(const RetrainOptions& options, const AdapterMethod& method,
                 const io::Checkpoint& model, const comm::Communicator& group) {
  Start start;
  if (options.adapter_previous || options.adapter_from) {
    start.stored = StoredAdapter::read(
        options.adapter_previous ? previous_file(model) : adapter_file_of(*options.adapter_from));
    start.stored->require_method(options.method, method.settings());
  }
  const io::Checkpoint base =
      options.adapter_previous ? train::without_terms(model, start.stored->matrices()) : model;
  start.base_checksum = driver::tensors_checksum(base, group);
  // The adapter beside a model is its own, whatever was pruned away below it since.
  if (options.adapter_from)
    start.stored->require_base(start.base_checksum, model.directory().string());
  return start;
}

fs::path find_index_sets(const RetrainOptions& options, const fs::path& stage_directory) {
  if (options.index_sets) return *options.index_sets;
  fs::path last;
  const fs::path run = stage_directory.parent_path();
  if (!fs::is_directory(run)) return last;
  for (const auto& entry : fs::directory_iterator(run)) {
    const fs::path file = entry.path() / "index_sets.h5";
    const bool before = entry.path().filename() < stage_directory.filename();
    if (before && fs::exists(file) && (last.empty() || last < file)) last = file;
  }
  return last;
}

}  // namespace espalier::retrain
