#include "pipeline/driver/run.h"

#include <fmt/format.h>

#include <chrono>
#include <cstring>
#include <map>
#include <optional>
#include <set>

#include "pipeline/driver/machine.h"
#include "pipeline/driver/plan.h"
#include "pipeline/driver/plan_of_run.h"
#include "pipeline/driver/run_directory.h"
#include "pipeline/driver/spread.h"
#include "pipeline/driver/table.h"
#include "pipeline/driver/token_sets.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/manifest.h"
#include "pipeline/linalg/product.h"
#include "pipeline/model/added_terms.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// Changes with the meaning of what stages leave.
constexpr const char* kNumericsVersion = "espalier 3";

struct Running {
  const Shared& shared;
  const std::vector<Entry>& entries;
  RunContext run;
  SharedStages* siblings;                       ///< of a sweep; null: none
  std::map<std::string, fs::path> models = {};  ///< by entry name, "start", "retrain.input"
  std::string chain = {};                       ///< hash of everything before the entry
  TokenSetChecksums token_sets = {};
  /// What `models` are, by the same names: the key of the stage that made the model.
  std::map<std::string, std::string> model_keys = {};
  std::map<std::string, std::string> stages = {};  ///< directories of the entries so far, by key
  std::string key = {};                            ///< of the entry at work
  json failure = {};  ///< failure.json of an earlier start, of a sweep's member; null: none

  fs::path model_of(const std::string& entry) const {
    const auto found = models.find(entry);
    if (found == models.end())
      throw UserError(
          fmt::format("\"{}\" is neither start nor an entry of the pipeline before this "
                      "one",
                      entry));
    return found->second;
  }
};

/// "name=key" for every model that a configuration names: in another pipeline of a sweep the same
/// name may stand for another model.
std::string named_models(const Running& running, const json& configuration) {
  std::string names;
  for (const auto& [key, value] : configuration.items()) {
    if (value.is_structured()) names += named_models(running, value);
    if (!value.is_string() || key == "stage") continue;  // which names a kind of stage
    const auto model = running.model_keys.find(value.get<std::string>());
    if (model != running.model_keys.end()) names += " " + model->first + "=" + model->second;
  }
  return names;
}

/// The key hashes configuration, everything before, the data that the stage reads and the numerics;
/// never ranks or threads, nor the entry's number: members of a sweep have equal stages in
/// different places.
std::string key_of(const Running& running, const Entry& entry) {
  const auto& group = running.run.group;
  std::string inputs =
      group.broadcast(group.is_root() ? entry.stage->checksum_of_inputs() : std::string());
  for (const auto& set : entry.stage->token_sets(running.run))
    if (!set.empty()) inputs += " " + running.token_sets.at(set);
  return io::checksum(fmt::format("{}\n{}\n{}\n{}\n{}\n{}\n{}\n{}", kNumericsVersion, entry.kind,
                                  entry.canonical, running.model_keys.at(entry.from),
                                  named_models(running, json::parse(entry.canonical)),
                                  running.chain, static_cast<int>(running.run.dtype), inputs));
}

/// What a stage wrote outside its directory (an export to a directory of the person's own).
/// Collective.
json outputs_elsewhere(const StageResult& result, const comm::Communicator& group) {
  if (result.files_elsewhere.empty()) return nullptr;
  std::vector<io::Output> outputs;
  if (group.is_root())
    for (const auto& name : result.files_elsewhere)
      outputs.push_back({name, static_cast<int64_t>(fs::file_size(result.model / name)), ""});
  return {{"directory", fs::absolute(result.model).string()},
          {"files", io::json_of(with_checksums(result.model, outputs, group))}};
}

/// The first output that is missing or altered, wherever it lies. Collective; rank 0's manifest
/// counts.
std::string damage_of(const fs::path& directory, const std::optional<io::Manifest>& manifest,
                      const comm::Communicator& group) {
  const auto none = std::vector<io::Output>();
  const std::string damage = damaged_output(directory, manifest ? manifest->outputs : none, group);
  if (!damage.empty()) return damage;
  json elsewhere = manifest ? manifest->facts.value("elsewhere", json()) : json();
  elsewhere = json::parse(group.broadcast(elsewhere.dump()));
  if (elsewhere.is_null()) return "";
  const std::string origin = (directory / "manifest.json").string();
  return damaged_output(elsewhere.at("directory").get<std::string>(),
                        io::outputs_of(elsewhere.at("files"), origin), group);
}

/// Clears what does not stand, but keeps the state of the very same stage to go on from. On rank 0.
void prepare_directory(const fs::path& directory, const std::string& key) {
  const fs::path key_file = directory / "state" / "key";
  const bool finished = fs::exists(directory / "manifest.json");
  const bool same_state = !finished && fs::exists(key_file) && io::read_file(key_file) == key;
  if (!same_state) {
    fs::remove_all(directory);
    io::write_file(key_file, key);
  }
  io::remove_leftovers(directory);
}

/// True when the stage stands as an earlier start left it.
bool stands(const Running& running, const Entry& entry, const std::string& key) {
  const auto& group = running.run.group;
  const fs::path directory = running.run.directory / entry.directory;
  std::optional<io::Manifest> manifest;
  if (group.is_root()) manifest = io::read_manifest(directory);
  int64_t same_key = manifest && manifest->key == key;
  group.broadcast(comm::bytes_of(std::span(&same_key, 1)), 0);
  const std::string damage = same_key ? damage_of(directory, manifest, group) : std::string();
  const bool kept = same_key && damage.empty();
  if (group.is_root()) {
    // A start that was killed behind its manifest has left it.
    if (kept) fs::remove_all(directory / "state");
    if (kept) fmt::print("{}  done before, kept\n", entry.directory);
    if (!damage.empty()) fmt::print("{}  {}; the stage is run again\n", entry.directory, damage);
    std::fflush(stdout);
  }
  return kept;
}

std::vector<int64_t> of_all_ranks(const comm::Communicator& group, int64_t value) {
  std::vector<int64_t> values;
  for (const auto& bytes : group.all_gather(comm::bytes_of(std::span(&value, 1)))) {
    int64_t one;
    std::memcpy(&one, bytes.data(), sizeof one);
    values.push_back(one);
  }
  return values;
}

/// What is done for a stage from its construction on.
class Meter {
 public:
  explicit Meter(const comm::Communicator& group)
      : group_(group), sent_before_(group.bytes_sent()) {
    reset_peak_resident();
  }
  /// Collective.
  void read_into(io::Manifest& manifest) const {
    const auto now = std::chrono::steady_clock::now();
    manifest.seconds = std::chrono::duration<double>(now - started_).count();
    manifest.peak_resident_bytes = of_all_ranks(group_, peak_resident_bytes());
    manifest.bytes_sent = of_all_ranks(group_, group_.bytes_sent() - sent_before_);
  }

 private:
  const comm::Communicator& group_;
  std::chrono::steady_clock::time_point started_ = std::chrono::steady_clock::now();
  int64_t sent_before_;
};

/// metrics.json; then what the manifest says of a stage that was computed. Collective.
void describe(const Running& running, const Entry& entry, const StageResult& result,
              io::Manifest& manifest) {
  const auto& group = running.run.group;
  const fs::path directory = running.run.directory / entry.directory;
  if (group.is_root()) io::write_file(directory / "metrics.json", result.metrics.dump(2) + "\n");
  manifest.outputs = list_outputs(directory, group);
  const json elsewhere = outputs_elsewhere(result, group);
  manifest.facts = {{"device", "cpu"},
                    {"backend", group.backend()},
                    {"ranks", group.size()},
                    {"threads_per_rank", running.shared.threads_per_rank},
                    {"products", linalg::product_description()},
                    {"versions", library_versions()},
                    {"dtype", running.run.dtype == at::kFloat ? "float32" : "bfloat16"},
                    {"kind", entry.kind}};
  if (!elsewhere.is_null()) manifest.facts["elsewhere"] = elsewhere;
}

/// Writes the manifest: only now the stage is finished.
void finish(const Running& running, const Entry& entry, const std::string& key,
            io::Manifest manifest) {
  if (!running.run.group.is_root()) return;
  manifest.stage = entry.node;
  manifest.key = key;
  manifest.status = "finished";
  const fs::path directory = running.run.directory / entry.directory;
  io::write_manifest(directory, manifest);
  fs::remove_all(directory / "state");
}

/// The model that an entry leaves: known from its files, whether it ran now or before.
fs::path model_left_by(const Running& running, const Entry& entry, const fs::path& input) {
  const fs::path model = running.run.directory / entry.directory / "model";
  if (entry.kind == "export") return input;  // an export is for others; its dtype may differ
  return fs::exists(model) ? model : input;
}

/// What rank 0 sees, and every rank must: a run.dir that is not on a file system shared by all
/// hosts would otherwise let ranks go on with different models.
fs::path agreed_model(const Running& running, const Entry& entry, const fs::path& input) {
  const auto& group = running.run.group;
  const fs::path left =
      group.broadcast(group.is_root() ? model_left_by(running, entry, input).string() : "");
  if (left != input)
    group.require_same("model left by " + entry.directory,
                       fs::exists(left) ? io::Checkpoint::open(left).fingerprint() : "absent");
  return left;
}

/// The stage as another member of the sweep left it; false when none did.
bool taken_over(const Running& running, const Entry& entry, const std::string& key,
                Progress& progress) {
  if (running.siblings == nullptr) return false;
  const auto& group = running.run.group;
  const Meter meter(group);
  const WantedStage wanted{running.run.directory, running.shared.model, entry.directory, key,
                           running.stages,        running.shared.resume};
  auto manifest = running.siblings->take_over(wanted, group, progress);
  if (!manifest) return false;
  meter.read_into(*manifest);
  finish(running, entry, key, *manifest);
  return true;
}

void compute(const Running& running, const Entry& entry, const std::string& key,
             const fs::path& input, Progress& progress) {
  const auto& group = running.run.group;
  const fs::path directory = running.run.directory / entry.directory;
  if (group.is_root()) prepare_directory(directory, key);
  group.barrier();
  const Meter meter(group);
  StageContext context{
      running.run, entry.node, directory,
      input,       progress,   [&](const std::string& name) {
                         return running.model_of(name); }};
  const StageResult result = entry.stage->carry_out(context);
  io::Manifest manifest;
  meter.read_into(manifest);
  describe(running, entry, result, manifest);
  finish(running, entry, key, manifest);
}

/// Throws Diverged when an earlier start of a sweep's member ended in this very computation.
void pass_over(const Running& running) {
  const json& failure = running.failure;
  if (!failure.is_object() || !failure.value("numerical", false) ||
      failure.value("key", "") != running.key)
    return;
  throw Diverged(fmt::format("{}: {}: {} (it is tried again when its failure.json is removed)",
                             running.run.directory.string(), failure.value("stage", ""),
                             failure.value("message", "")));
}

void run_entry(Running& running, const Entry& entry) {
  const auto& group = running.run.group;
  const std::string key = key_of(running, entry);
  running.key = key;
  const fs::path input = running.model_of(entry.from);
  // A model with an adapter beside its matrices is no base: one that merges it took no other start.
  if (entry.kind == "retrain" && model::matrices_with_terms(io::Checkpoint::open(input)).empty())
    running.models["retrain.input"] = input;
  if (!stands(running, entry, key)) {
    Progress progress(entry.directory, group.is_root() ? running.run.directory : fs::path());
    if (!taken_over(running, entry, key, progress)) {
      pass_over(running);
      compute(running, entry, key, input, progress);
    }
  }
  group.barrier();
  const fs::path left = agreed_model(running, entry, input);
  running.models[entry.name] = left;
  running.model_keys[entry.name] = left == input ? running.model_keys.at(entry.from) : key;
  running.stages[key] = entry.directory;
  if (running.siblings != nullptr && group.is_root())
    running.siblings->add(key, running.run.directory / entry.directory);
  if (entry.kind != "evaluate" && entry.kind != "export") running.chain = key;
}

/// failure.json: where and why, for the report of a run that did not end. Best effort: the error
/// itself is what the person must see.
void write_failure(const Running& running, const Entry& entry,
                   const std::exception& error) noexcept {
  try {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    io::write_file(running.run.directory / "failure.json",
                   json{{"stage", entry.directory},
                        {"message", error.what()},
                        {"numerical", dynamic_cast<const NumericalError*>(&error) != nullptr},
                        {"key", running.key},
                        {"rank", running.run.group.rank()},
                        {"time", std::chrono::duration<double>(now).count()}}
                           .dump(2) +
                       "\n");
  } catch (...) {
  }
}

/// failure.json as it lies there; null without one, or where it is damaged.
json failure_in(const fs::path& run_directory) {
  const fs::path file = run_directory / "failure.json";
  if (!fs::exists(file)) return {};
  const json failure = json::parse(io::read_file(file), nullptr, false);
  return failure.is_discarded() ? json() : failure;
}

/// The same on all ranks; null for a run that is to begin anew. Collective.
json earlier_failure(const Shared& shared, const comm::Communicator& group) {
  const bool wanted = group.is_root() && shared.resume;
  return json::parse(group.broadcast((wanted ? failure_in(shared.run_directory) : json()).dump()));
}

/// What the first key stands on: the model and the seed.
std::string start_of_chain(const Shared& shared) {
  return io::checksum(
      fmt::format("{} {}", io::Checkpoint::open(shared.model).fingerprint(), shared.seed));
}

/// Holds the token sets against the model, and against what the other ranks read under their names.
void take_token_sets(Running& running) {
  running.token_sets = checksums_of_token_sets(running.entries, running.run);
  std::string listing;
  for (const auto& [set, checksum] : running.token_sets)
    listing += fmt::format("{} {}\n", checksum, set.string());
  running.run.group.require_same("data", listing);
  require_tokenizer(running.token_sets, running.run, running.shared.model);
}

std::vector<Entry> read_agreed_entries(const config::Composition& composition,
                                       const config::Section& root, const Shared& shared,
                                       const comm::Communicator& group) {
  std::vector<Entry> entries = read_entries(root, shared);
  group.require_same("configuration", composition.json(true));
  group.require_same("library versions", library_versions());
  return entries;
}

RunContext context_of(const Shared& shared, Workers& workers, const comm::Communicator& group) {
  return {group,
          &workers,
          shared.run_directory,
          shared.seed,
          shared.dtype,
          shared.calibration_data,
          shared.train_data,
          shared.memory_bytes};
}

bool changes_model(const Entry& entry) {
  return entry.kind == "prune" || entry.kind == "retrain" || entry.kind == "compress";
}

/// A run that has been read and checked; nothing is written yet. Collective.
struct Prepared {
  config::Section root;  // one for all readers: what none of them read is refused
  Shared shared;
  std::vector<Entry> entries;
  Workers workers;
  Running running;

  Prepared(const config::Composition& composition, const comm::Communicator& group,
           SharedStages* siblings)
      : root(composition.root()),
        shared(read_shared(root)),
        entries(read_agreed_entries(composition, root, shared, group)),
        workers(shared.threads_per_rank, linalg::one_library_thread),
        running{shared, entries, context_of(shared, workers, group), siblings} {
    running.models["start"] = shared.model;
    running.chain = start_of_chain(shared);
    group.require_same("model", running.chain);
    running.model_keys["start"] = running.chain;
    check_entries();
    take_token_sets(running);
  }

  void check_entries() const {
    RunContext checked = running.run;
    std::set<std::string> of_start = {"start"};  // names of the model that the run starts from
    for (const auto& entry : entries) {
      checked.takes_start_model = of_start.contains(entry.from);
      entry.stage->check(checked, shared.model);
      if (checked.takes_start_model && !changes_model(entry)) of_start.insert(entry.name);
      checked.earlier.push_back({entry.kind, json::parse(entry.canonical)});
    }
  }
};

}  // namespace

void carry_out(const config::Composition& composition, comm::Communicator group,
               SharedStages* siblings) {
  Prepared prepared(composition, group, siblings);
  const Shared& shared = prepared.shared;
  if (siblings != nullptr) prepared.running.failure = earlier_failure(shared, group);
  std::unique_ptr<RunLock> lock;
  if (group.is_root()) lock = open_run_directory(composition, shared, group);
  group.barrier();
  const fs::path environment = shared.run_directory / "environment.json";
  group.require_same("run directory (it must lie on a file system that all ranks share)",
                     fs::exists(environment) ? io::read_file(environment) : "absent");
  for (const auto& entry : prepared.entries) {
    try {
      run_entry(prepared.running, entry);
    } catch (const Requeue&) {
      throw;
    } catch (const Diverged&) {
      if (group.is_root())
        io::write_file(shared.run_directory / "failure.json",
                       prepared.running.failure.dump(2) + "\n");
      throw;
    } catch (const std::exception& error) {
      write_failure(prepared.running, entry, error);
      throw;
    }
  }
  if (!group.is_root()) return;
  fs::remove(shared.run_directory / kProgressFile);
  print_table(shared.run_directory, prepared.entries);
}

void check(const config::Composition& composition, comm::Communicator group) {
  const Prepared prepared(composition, group, nullptr);
  if (group.is_root()) check_run_directory(composition, prepared.shared);
  group.barrier();
}

std::string what_is_due(const config::Composition& composition) {
  try {
    const config::Section root = composition.root();
    const Shared shared = read_shared(root);
    const std::vector<Entry> entries = read_entries(root, shared);
    check_run_directory(composition, shared);
    const json failure = failure_in(shared.run_directory);
    if (failure.is_object())
      return fmt::format("{}: {}", failure.value("stage", ""), failure.value("message", ""));
    for (const Entry& entry : entries)
      if (!io::read_manifest(shared.run_directory / entry.directory))
        return entry.directory + " is not finished";
    return "";
  } catch (const UserError& error) {
    return error.what();
  }
}

void plan(const config::Composition& composition, comm::Communicator group) {
  const Prepared prepared(composition, group, nullptr);
  if (group.is_root()) {
    check_run_directory(composition, prepared.shared);
    print_plan(prepared.entries, prepared.shared, prepared.running.run);
  }
  group.barrier();
}

}  // namespace espalier::driver
