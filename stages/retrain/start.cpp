#include "stages/retrain/start.h"

#include <fmt/format.h>

#include "pipeline/driver/spread.h"
#include "pipeline/errors.h"
#include "pipeline/model/added_terms.h"

namespace espalier::retrain {

namespace {

namespace fs = std::filesystem;

/// The file that belongs to what stands beside the model's matrices. A stage that changed those
/// terms (pruning heads) leaves an adapters.h5 of its own, which comes first.
fs::path previous_file(const io::Checkpoint& model) {
  if (model::matrices_with_terms(model).empty())
    throw UserError(fmt::format(
        "retrain.adapter: previous, but no adapter stands beside the matrices of {}: the retrain "
        "stage before must end with merge: beside",
        model.directory().string()));
  for (const fs::path& directory : model.chain()) {
    const fs::path file = directory.parent_path() / "adapters.h5";
    if (fs::exists(file)) return file;
  }
  throw UserError(fmt::format(
      "retrain.adapter: previous, but none of the stages that {} comes from holds adapters.h5",
      model.directory().string()));
}

}  // namespace

fs::path adapter_file_of(const std::string& adapter_from) {
  const fs::path path = adapter_from;
  return fs::is_directory(path) ? path / "adapters.h5" : path;
}

Start find_start(const RetrainOptions& options, const io::Checkpoint& model,
                 const comm::Communicator& group) {
  Start start;
  const bool previous = options.adapter_previous;
  const io::Checkpoint base = previous ? model.without(model::is_term) : model;
  start.base_checksum = driver::tensors_checksum(base, group);
  if (!previous && !options.adapter_from) return start;
  start.stored =
      StoredAdapter::read(previous ? previous_file(model) : adapter_file_of(*options.adapter_from));
  start.stored->require_method({options.method, options.settings, {}});
  // The adapter beside a model is its own, whatever was pruned away below it since.
  if (!previous) start.stored->require_base(start.base_checksum, model.directory().string());
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
