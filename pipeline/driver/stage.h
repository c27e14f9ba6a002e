#pragma once
/// What a stage is given and what it leaves. A stage registers itself under the name that
/// configurations use; adding one needs no line elsewhere.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/config/section.h"
#include "pipeline/driver/progress.h"
#include "pipeline/workers.h"

namespace espalier::driver {

/// An entry of the pipeline that comes before another.
struct EarlierEntry {
  std::string kind;         ///< "retrain"
  nlohmann::json settings;  ///< its resolved keys

  /// Whether it leaves an adapter beside the matrices: a retrain stage with merge: beside.
  bool leaves_adapter() const;
};

/// What every stage of a run shares.
struct RunContext {
  comm::Communicator group;
  Workers* workers = nullptr;
  std::filesystem::path directory;  ///< run.dir
  uint64_t seed = 0;
  at::ScalarType dtype;  ///< model.dtype: products, and weights between stages
  std::filesystem::path calibration_data, train_data;  ///< empty when unset
  int64_t memory_bytes = 0;                            ///< of this rank; 0: no limit was set
  /// For Stage::check alone: what comes before its entry, and whether the entry takes the model
  /// that the run starts from, as it is.
  std::vector<EarlierEntry> earlier = {};
  bool takes_start_model = false;
};

struct StageContext {
  const RunContext& run;
  std::string node;                   ///< "prune", "prune_again"
  std::filesystem::path directory;    ///< <run.dir>/03-prune
  std::filesystem::path input_model;  ///< a checkpoint or a derived model directory
  Progress& progress;
  /// The model a pipeline entry left ("start", "evaluate#2", "retrain"); "retrain.input" is the
  /// last that a retrain stage took without an adapter beside its matrices.
  std::function<std::filesystem::path(const std::string& entry)> model_of;

  /// Everything a unit of work may be resumed from; not part of the outputs, removed at the end.
  std::filesystem::path state_directory() const { return directory / "state"; }
};

struct StageResult {
  std::filesystem::path
      model;               ///< what the next stage reads; the input when the stage changes none
  nlohmann::json metrics;  ///< written to metrics.json by the driver
  /// Names of what was written into `model` when that lies outside of the stage's directory. On
  /// every rank.
  std::vector<std::string> files_elsewhere = {};
};

/// What --plan says of a stage: sentences, then a table whose first row holds the titles.
struct StagePlan {
  std::vector<std::string> lines;
  std::vector<std::vector<std::string>> table = {};
};

/// One stage of one run: configured (and checked) before anything runs, then carried out.
class Stage {
 public:
  virtual ~Stage() = default;
  /// Checks paths, shapes, vocabulary against the model the *run starts from*: everything that can
  /// be refused before work begins. Throws UserError. Collective.
  virtual void check(const RunContext& run, const std::filesystem::path& start_model) const = 0;
  virtual StageResult carry_out(StageContext& context) const = 0;
  /// What carry_out() will do, told from settings, names and shapes once check() has passed; of the
  /// model the *run starts from*, whose shapes the stages before this one keep. On rank 0.
  virtual StagePlan plan(const RunContext& run, const std::filesystem::path& start_model) const = 0;
  /// The token sets it reads: when one changes the stage is run again, and each must come from the
  /// model's tokenizer. Empty paths are passed over.
  virtual std::vector<std::filesystem::path> token_sets(const RunContext&) const { return {}; }
  /// Checksums of what it reads besides its model and token sets: when they change, the stage is
  /// run again. Called on rank 0.
  virtual std::string checksum_of_inputs() const { return {}; }
};

/// Reads its keys (config::Section) and gives the stage.
using StageFactory = std::function<std::unique_ptr<Stage>(const config::Section& section)>;

/// const StageRegistration registration{"prune", make_prune};
struct StageRegistration {
  StageRegistration(const std::string& name, StageFactory factory);
};
/// Throws UserError that lists the stages when there is none of that name.
std::unique_ptr<Stage> make_stage(const std::string& name, const config::Section& section);

}  // namespace espalier::driver
