#include "pipeline/driver/run.h"

#include <fmt/format.h>

#include <chrono>
#include <cstring>
#include <map>

#include "pipeline/driver/machine.h"
#include "pipeline/driver/plan_of_run.h"
#include "pipeline/driver/run_directory.h"
#include "pipeline/driver/table.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/manifest.h"
#include "pipeline/linalg/product.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// Changes with the meaning of what stages leave.
constexpr const char* kNumericsVersion = "espalier 1";

struct Running {
  const Shared& shared;
  const std::vector<Entry>& entries;
  RunContext run;
  std::map<std::string, fs::path> models;  ///< by entry name, "start", "retrain.input"
  std::string chain;                       ///< hash of everything before the entry

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

/// The key hashes configuration, everything before, the data and the numerics; never ranks or
/// threads.
std::string key_of(const Running& running, const Entry& entry) {
  const auto& group = running.run.group;
  const std::string inputs =
      group.broadcast(group.is_root() ? entry.stage->checksum_of_inputs() : std::string());
  return io::checksum(fmt::format("{}\n{}\n{}\n{}\n{}\n{}\n{}", kNumericsVersion, entry.kind,
                                  entry.canonical, entry.from, running.chain,
                                  static_cast<int>(running.run.dtype), inputs));
}

/// What a stage wrote outside its directory (an export to a directory of the person's own).
json outputs_elsewhere(const fs::path& stage_directory, const fs::path& model) {
  if (fs::absolute(model).lexically_normal() ==
      fs::absolute(stage_directory / "model").lexically_normal())
    return nullptr;
  json files = json::array();
  for (const auto& output : io::list_outputs(model))
    files.push_back(
        {{"path", output.path}, {"bytes", output.bytes}, {"checksum", output.checksum}});
  return {{"directory", fs::absolute(model).string()}, {"files", files}};
}

std::string damage_elsewhere(const json& facts) {
  if (!facts.contains("elsewhere") || facts["elsewhere"].is_null()) return {};
  io::Manifest manifest;
  for (const json& file : facts["elsewhere"].at("files"))
    manifest.outputs.push_back({file.at("path").get<std::string>(), file.at("bytes").get<int64_t>(),
                                file.at("checksum").get<std::string>()});
  return io::damaged_output(facts["elsewhere"].at("directory").get<std::string>(), manifest);
}

/// The first output that is missing or altered, wherever it lies.
std::string damage_of(const fs::path& directory, const io::Manifest& manifest) {
  const std::string damage = io::damaged_output(directory, manifest);
  return damage.empty() ? damage_elsewhere(manifest.facts) : damage;
}

/// True when the stage stands as an earlier start left it. Rank 0 looks, all ranks hear; what does
/// not stand is cleared, but the state of the very same stage is kept to go on from.
bool stands(const Running& running, const Entry& entry, const std::string& key) {
  int64_t kept = 0;
  if (running.run.group.is_root()) {
    const fs::path directory = running.run.directory / entry.directory;
    const auto manifest = io::read_manifest(directory);
    const std::string damage =
        manifest && manifest->key == key ? damage_of(directory, *manifest) : std::string();
    kept = manifest && manifest->key == key && damage.empty();
    if (kept) {
      fmt::print("{}  done before, kept\n", entry.directory);
    } else {
      if (!damage.empty()) fmt::print("{}  {}; the stage is run again\n", entry.directory, damage);
      const fs::path key_file = directory / "state" / "key";
      const bool same_state = !manifest && fs::exists(key_file) && io::read_file(key_file) == key;
      if (!same_state) {
        fs::remove_all(directory);
        io::write_file(key_file, key);
      }
      io::remove_leftovers(directory);
    }
    std::fflush(stdout);
  }
  running.run.group.broadcast(comm::bytes_of(std::span(&kept, 1)), 0);
  return kept != 0;
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

/// metrics.json, then the manifest: only now the stage is finished.
void finish(const Running& running, const Entry& entry, const std::string& key,
            const StageResult& result, double seconds, int64_t sent_before) {
  const auto& group = running.run.group;
  const auto peaks = of_all_ranks(group, peak_resident_bytes());
  const auto sent = of_all_ranks(group, group.bytes_sent() - sent_before);
  if (!group.is_root()) return;
  const fs::path directory = running.run.directory / entry.directory;
  io::write_file(directory / "metrics.json", result.metrics.dump(2) + "\n");
  io::Manifest manifest;
  manifest.stage = entry.node;
  manifest.key = key;
  manifest.status = "finished";
  manifest.seconds = seconds;
  manifest.peak_resident_bytes = peaks;
  manifest.bytes_sent = sent;
  manifest.outputs = io::list_outputs(directory);
  manifest.facts = {{"device", "cpu"},
                    {"backend", group.backend()},
                    {"ranks", group.size()},
                    {"threads_per_rank", running.shared.threads_per_rank},
                    {"products", linalg::product_description()},
                    {"dtype", running.run.dtype == at::kFloat ? "float32" : "bfloat16"},
                    {"kind", entry.kind}};
  if (entry.kind == "export")
    manifest.facts["elsewhere"] = outputs_elsewhere(directory, result.model);
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

void run_entry(Running& running, const Entry& entry) {
  const auto& group = running.run.group;
  const std::string key = key_of(running, entry);
  const fs::path input = running.model_of(entry.from);
  if (entry.kind == "retrain") running.models["retrain.input"] = input;
  if (!stands(running, entry, key)) {
    reset_peak_resident();
    const int64_t sent_before = group.bytes_sent();
    const auto started = std::chrono::steady_clock::now();
    Progress progress(entry.directory,
                      group.is_root() ? running.run.directory / "metrics.jsonl" : fs::path());
    StageContext context{
        running.run, entry.node, running.run.directory / entry.directory,
        input,       progress,   [&](const std::string& name) { return running.model_of(name); }};
    const StageResult result = entry.stage->carry_out(context);
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
    finish(running, entry, key, result, seconds, sent_before);
  }
  group.barrier();
  running.models[entry.name] = agreed_model(running, entry, input);
  if (entry.kind != "evaluate" && entry.kind != "export") running.chain = key;
}

/// failure.json: where and why, for the report of a run that did not end. Best effort: the error
/// itself is what the person must see.
void write_failure(const Running& running, const Entry& entry,
                   const std::string& message) noexcept {
  try {
    const auto now = std::chrono::system_clock::now().time_since_epoch();
    io::write_file(running.run.directory / "failure.json",
                   json{{"stage", entry.directory},
                        {"message", message},
                        {"rank", running.run.group.rank()},
                        {"time", std::chrono::duration<double>(now).count()}}
                           .dump(2) +
                       "\n");
  } catch (...) {
  }
}

/// What the first key stands on: the model, the data, the seed.
std::string start_of_chain(const Shared& shared) {
  const auto data = [](const fs::path& file) {
    return file.empty() ? std::string("none") : io::file_checksum(file);
  };
  return io::checksum(fmt::format("{} {} {} {}", io::Checkpoint::open(shared.model).fingerprint(),
                                  data(shared.calibration_data), data(shared.train_data),
                                  shared.seed));
}

}  // namespace

void carry_out(const config::Composition& composition, comm::Communicator group) {
  const config::Section root = composition.root();
  const Shared shared = read_shared(root);
  const std::vector<Entry> entries = read_entries(root, shared);
  group.require_same("configuration", composition.json(true));
  group.require_same("library versions", library_versions());

  Workers workers(shared.threads_per_rank, linalg::one_library_thread);
  Running running{shared,
                  entries,
                  {group, &workers, shared.run_directory, shared.seed, shared.dtype,
                   shared.calibration_data, shared.train_data},
                  {{"start", shared.model}},
                  start_of_chain(shared)};
  group.require_same("model and data", running.chain);
  for (const auto& entry : entries) entry.stage->check(running.run, shared.model);
  if (group.is_root()) open_run_directory(composition, shared, group);
  group.barrier();
  const fs::path environment = shared.run_directory / "environment.json";
  group.require_same("run directory (it must lie on a file system that all ranks share)",
                     fs::exists(environment) ? io::read_file(environment) : "absent");
  for (const auto& entry : entries) {
    try {
      run_entry(running, entry);
    } catch (const Requeue&) {
      throw;
    } catch (const std::exception& error) {
      write_failure(running, entry, error.what());
      throw;
    }
  }
  if (group.is_root()) print_table(shared.run_directory, entries);
}

}  // namespace espalier::driver
