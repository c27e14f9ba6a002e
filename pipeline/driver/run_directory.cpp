#include "pipeline/driver/run_directory.h"

#include <fmt/format.h>

#include <cctype>
#include <nlohmann/json.hpp>

#include "pipeline/driver/machine.h"
#include "pipeline/driver/progress.h"
#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// Keys that change no result.
json without_free_keys(json configuration) {
  configuration.erase("cluster");
  if (configuration.contains("run")) configuration["run"].erase("resume");
  if (configuration.contains("run")) configuration["run"].erase("dir");
  return configuration;
}

std::string dotted(const std::string& pointer) {
  std::string text = pointer.empty() ? pointer : pointer.substr(1);
  for (char& c : text)
    if (c == '/') c = '.';
  return text;
}

/// "prune.method=wanda and now asks for sparsegpt" of the first leaf that differs.
std::string first_difference(const json& before, const json& now) {
  const json old_leaves = before.flatten(), new_leaves = now.flatten();
  const auto value = [](const json& leaves, const std::string& key) {
    if (!leaves.contains(key)) return std::string("(unset)");
    return leaves[key].is_string() ? leaves[key].get<std::string>() : leaves[key].dump();
  };
  for (const json& leaves : {old_leaves, new_leaves})
    for (const auto& [key, ignored] : leaves.items())
      if (value(old_leaves, key) != value(new_leaves, key))
        return fmt::format("{}={} and now asks for {}", dotted(key), value(old_leaves, key),
                           value(new_leaves, key));
  return "";
}

void remove_earlier_run(const fs::path& directory) {
  for (const auto& entry : fs::directory_iterator(directory))
    if (is_stage_directory(entry.path())) fs::remove_all(entry.path());
  for (const char* name :
       {"config.yaml", "environment.json", "metrics.jsonl", "report.html", "failure.json"})
    fs::remove(directory / name);
}

}  // namespace

bool is_stage_directory(const fs::path& path) {
  const std::string name = path.filename().string();
  return fs::is_directory(path) && name.size() > 3 && std::isdigit(name[0]) &&
         std::isdigit(name[1]) && name.find('-') != std::string::npos;
}

void check_run_directory(const config::Composition& composition, const Shared& shared) {
  const fs::path& directory = shared.run_directory;
  const fs::path environment_file = directory / "environment.json";
  io::require_space(directory, 1 << 20);
  if (!fs::exists(environment_file) || !shared.resume) return;
  const json environment = json::parse(io::read_file(environment_file), nullptr, false);
  if (environment.is_discarded() || !environment.contains("configuration"))
    throw UserError(
        fmt::format("{}: cannot be read; choose another run.dir, or pass run.resume=false, which "
                    "removes the run's stages",
                    environment_file.string()));
  const std::string difference = first_difference(
      environment["configuration"], without_free_keys(json::parse(composition.json(true))));
  if (!difference.empty())
    throw UserError(
        fmt::format("{0}: the run was started with {1}; choose another run.dir (a model that it "
                    "left can be taken by model.path={0}/ENTRY/model), or pass run.resume=false, "
                    "which removes its stages",
                    directory.string(), difference));
}

std::unique_ptr<RunLock> open_run_directory(const config::Composition& composition,
                                            const Shared& shared, const comm::Communicator& group) {
  const fs::path& directory = shared.run_directory;
  const fs::path environment_file = directory / "environment.json";
  check_run_directory(composition, shared);  // a refused start leaves no lock with another's run
  auto lock = std::make_unique<RunLock>(directory);
  check_run_directory(composition, shared);  // another start may have begun a run meanwhile
  if (fs::exists(environment_file) && !shared.resume) remove_earlier_run(directory);
  io::remove_leftovers(directory);
  for (const char* name : {"failure.json", kProgressFile}) fs::remove(directory / name);
  json environment = describe_machine();
  environment["ranks"] = group.size();
  environment["threads_per_rank"] = shared.threads_per_rank;
  environment["device"] = "cpu";
  environment["backend"] = group.backend();
  environment["configuration"] = without_free_keys(json::parse(composition.json(true)));
  io::write_file(directory / "config.yaml", composition.yaml(true));
  io::write_file(environment_file, environment.dump(2) + "\n");
  return lock;
}

}  // namespace espalier::driver
