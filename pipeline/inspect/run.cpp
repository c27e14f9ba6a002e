#include "pipeline/inspect/run.h"

#include <fmt/format.h>

#include <algorithm>

#include "pipeline/io/atomic_file.h"
#include "pipeline/io/json.h"
#include "pipeline/io/manifest.h"

namespace espalier::inspect {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;

constexpr const char* kEnvironmentFile = "environment.json";
constexpr const char* kManifestFile = "manifest.json";

nlohmann::json read_json(const fs::path& file) {
  return fs::exists(file) ? io::parse_json(io::read_file(file), file.string()) : nlohmann::json();
}

int64_t bytes_of(const std::vector<io::Output>& outputs) {
  int64_t bytes = 0;
  for (const io::Output& output : outputs) bytes += output.bytes;
  return bytes;
}

json stage_row(const fs::path& directory) {
  json row = {{"name", directory.filename().string()}};
  const auto manifest = io::read_manifest(directory);
  if (!manifest) {
    row["status"] = fs::exists(directory) ? "unfinished" : "due";
    return row;
  }
  const auto& peaks = manifest->peak_resident_bytes;
  row["status"] = manifest->status;
  row["seconds"] = manifest->seconds;
  row["peak_bytes"] = peaks.empty() ? 0 : *std::max_element(peaks.begin(), peaks.end());
  row["bytes"] = bytes_of(manifest->outputs);
  return row;
}

}  // namespace

bool is_run(const fs::path& directory) { return fs::exists(directory / kEnvironmentFile); }
bool is_stage(const fs::path& directory) { return fs::exists(directory / kManifestFile); }

json describe_run(const fs::path& directory) {
  const nlohmann::json environment = read_json(directory / kEnvironmentFile);
  const nlohmann::json configuration = environment.value("configuration", nlohmann::json::object());
  json inspection = {{"kind", "run"}};
  for (const char* key : {"espalier", "host", "processor", "ranks", "threads_per_rank"})
    if (environment.contains(key)) inspection[key] = environment[key];
  if (configuration.contains("model"))
    inspection["model"] = configuration["model"].value("path", "");
  if (configuration.contains("run")) inspection["seed"] = configuration["run"].value("seed", 0);
  if (const nlohmann::json owner = read_json(directory / "run.lock"); owner.is_object())
    inspection["in_use_by"] = fmt::format("process {} on {} since {}", owner.value("process", 0),
                                          owner.value("host", ""), owner.value("time", ""));
  if (const nlohmann::json failure = read_json(directory / "failure.json"); failure.is_object())
    inspection["failure"] =
        fmt::format("{}: {}", failure.value("stage", ""), failure.value("message", ""));
  json stages = json::array();
  int64_t number = 0;
  for (const nlohmann::json& entry : configuration.value("pipeline", nlohmann::json::array()))
    if (entry.is_string())
      stages.push_back(
          stage_row(directory / fmt::format("{:02}-{}", ++number, entry.get<std::string>())));
  inspection["stages"] = std::move(stages);
  return inspection;
}

json describe_stage(const fs::path& directory) {
  const auto manifest = io::read_manifest(directory);
  json inspection = {{"kind", "stage"},
                     {"stage", manifest->stage},
                     {"status", manifest->status},
                     {"key", manifest->key},
                     {"seconds", manifest->seconds},
                     {"bytes", bytes_of(manifest->outputs)}};
  for (const char* key : {"ranks", "threads_per_rank", "dtype", "backend", "products"})
    if (manifest->facts.contains(key)) inspection[key] = manifest->facts[key];
  const nlohmann::json metrics = read_json(directory / "metrics.json");
  for (const auto& [name, value] : metrics.items())
    if (value.is_primitive() && !value.is_null()) inspection["metrics"][name] = value;
  json outputs = json::array();
  for (const io::Output& output : manifest->outputs)
    outputs.push_back({{"name", output.path}, {"bytes", output.bytes}});
  inspection["outputs"] = std::move(outputs);
  return inspection;
}

}  // namespace espalier::inspect
