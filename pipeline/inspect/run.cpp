#include "pipeline/inspect/run.h"

#include <fmt/format.h>

#include <algorithm>

#include "pipeline/driver/run_directory.h"
#include "pipeline/driver/run_lock.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/json.h"
#include "pipeline/io/manifest.h"

namespace espalier::inspect {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;
using Parsed = nlohmann::json;

constexpr const char* kEnvironmentFile = "environment.json";
constexpr const char* kManifestFile = "manifest.json";

void add(json& inspection, const char* name, const Parsed& value) {
  if (value.is_primitive() && !value.is_null()) inspection[name] = value;
}

int64_t bytes_of(const std::vector<io::Output>& outputs) {
  int64_t bytes = 0;
  for (const io::Output& output : outputs) bytes += output.bytes;
  return bytes;
}

int64_t largest(const Parsed& numbers) {
  int64_t most = 0;
  for (const Parsed& number : numbers) most = std::max(most, io::non_negative_integer(number));
  return most;
}

/// What it took is told of the start that computed it, though another member of a sweep had it.
json stage_row(const fs::path& directory) {
  json row = {{"name", directory.filename().string()}};
  const auto manifest = io::read_manifest(directory);
  if (!manifest) {
    row["status"] = fs::exists(directory) ? "unfinished" : "due";
    return row;
  }
  const Parsed here = {{"seconds", manifest->seconds},
                       {"peak_resident_bytes", manifest->peak_resident_bytes}};
  const Parsed elsewhere = io::value_at(manifest->facts, {"taken_over", "computing"});
  const Parsed& cost = elsewhere.is_object() ? elsewhere : here;
  row["status"] = manifest->status;
  add(row, "seconds", io::value_at(cost, {"seconds"}));
  row["peak_bytes"] = largest(io::value_at(cost, {"peak_resident_bytes"}));
  row["bytes"] = bytes_of(manifest->outputs);
  add(row, "taken_over_from", io::value_at(manifest->facts, {"taken_over", "member"}));
  return row;
}

/// The figures of a stage; of an evaluation those that each task reports.
json figures_of(const Parsed& metrics) {
  json figures = json::object();
  for (const auto& [name, value] : metrics.items()) add(figures, name.c_str(), value);
  const Parsed tasks = io::value_at(metrics, {"tasks"});
  if (!tasks.is_object()) return figures;
  for (const auto& [task, row] : tasks.items())
    for (const Parsed& name : io::value_at(row, {"reported"}))
      if (name.is_string())
        add(figures, fmt::format("{} {}", task, name.get<std::string>()).c_str(),
            io::value_at(row, {name.get<std::string>().c_str()}));
  return figures;
}

}  // namespace

Parsed read_object(const fs::path& file) {
  if (!fs::exists(file)) return Parsed::object();
  const Parsed content = io::parse_json(io::read_file(file), file.string());
  if (!content.is_object())
    throw UserError(fmt::format("{}: an object is expected; it is damaged", file.string()));
  return content;
}

std::vector<fs::path> runs_below(const fs::path& directory) {
  std::vector<fs::path> runs;
  for (const std::string& name : io::subdirectories(directory))
    if (is_run(directory / name)) runs.push_back(directory / name);
  return runs;
}

bool is_sweep(const fs::path& directory) { return !runs_below(directory).empty(); }
bool is_run(const fs::path& directory) { return fs::exists(directory / kEnvironmentFile); }
bool is_stage(const fs::path& directory) {
  return fs::exists(directory / kManifestFile) ||
         (driver::is_stage_directory(directory) && is_run(fs::absolute(directory).parent_path()));
}

json stages_of(const fs::path& run) {
  const Parsed environment = read_object(run / kEnvironmentFile);
  json stages = json::array();
  int64_t number = 0;
  for (const Parsed& entry : io::value_at(environment, {"configuration", "pipeline"}))
    if (entry.is_string())
      stages.push_back(
          stage_row(run / fmt::format("{:02}-{}", ++number, entry.get<std::string>())));
  return stages;
}

std::string failure_of(const fs::path& run) {
  const Parsed failure = read_object(run / "failure.json");
  if (failure.empty()) return "";
  return fmt::format("{}: {}", io::text_at(failure, {"stage"}), io::text_at(failure, {"message"}));
}

json describe_sweep(const fs::path& directory) {
  json members = json::array();
  for (const fs::path& run : runs_below(directory)) {
    const json stages = stages_of(run);
    const auto finished = std::count_if(stages.begin(), stages.end(), [](const json& stage) {
      return stage["status"] == "finished";
    });
    json member = {
        {"name", run.filename().string()}, {"finished", finished}, {"stages", stages.size()}};
    if (const std::string failure = failure_of(run); !failure.empty()) member["failure"] = failure;
    members.push_back(std::move(member));
  }
  return {{"kind", "sweep"}, {"members", std::move(members)}};
}

json describe_run(const fs::path& directory) {
  const Parsed environment = read_object(directory / kEnvironmentFile);
  json inspection = {{"kind", "run"}};
  for (const char* key : {"espalier", "host", "processor", "ranks", "threads_per_rank"})
    add(inspection, key, io::value_at(environment, {key}));
  add(inspection, "model", io::value_at(environment, {"configuration", "model", "path"}));
  add(inspection, "seed", io::value_at(environment, {"configuration", "run", "seed"}));
  if (const auto owner = driver::owner_of(directory)) inspection["in_use_by"] = owner->text;
  if (const std::string failure = failure_of(directory); !failure.empty())
    inspection["failure"] = failure;
  inspection["stages"] = stages_of(directory);
  return inspection;
}

json describe_stage(const fs::path& directory) {
  const auto manifest = io::read_manifest(directory);
  json inspection = {{"kind", "stage"}};
  if (!manifest) {
    inspection["status"] = "unfinished";
    return inspection;
  }
  inspection.update({{"stage", manifest->stage},
                     {"status", manifest->status},
                     {"key", manifest->key},
                     {"seconds", manifest->seconds},
                     {"bytes", bytes_of(manifest->outputs)}});
  for (const char* key : {"ranks", "threads_per_rank", "dtype", "backend", "products"})
    add(inspection, key, io::value_at(manifest->facts, {key}));
  inspection["metrics"] = figures_of(read_object(directory / "metrics.json"));
  json outputs = json::array();
  for (const io::Output& output : manifest->outputs)
    outputs.push_back({{"name", output.path}, {"bytes", output.bytes}});
  inspection["outputs"] = std::move(outputs);
  return inspection;
}

}  // namespace espalier::inspect
