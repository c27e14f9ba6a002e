#include "pipeline/inspect/status.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/driver/progress.h"
#include "pipeline/driver/run_lock.h"
#include "pipeline/driver/sweep_summary.h"
#include "pipeline/errors.h"
#include "pipeline/inspect/run.h"
#include "pipeline/io/atomic_file.h"

namespace espalier::inspect {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;
using Parsed = nlohmann::json;

constexpr const char* kStates[] = {"finished", "failed", "working", "silent", "stopped", "due"};

/// The content of progress.json; null when it is not there (any more), or damaged.
Parsed told_by(const fs::path& file) {
  constexpr size_t kMaxBytes = size_t{64} << 10;
  try {
    const Parsed told = Parsed::parse(io::read_file(file, kMaxBytes), nullptr, false);
    return told.is_object() ? told : Parsed();
  } catch (const UserError&) {
    return {};
  }
}

double seconds_since_written(const fs::path& file) {
  std::error_code error;
  const auto written = fs::last_write_time(file, error);
  if (error) return 0;
  const auto age = fs::file_time_type::clock::now() - written;
  return std::max(0.0, std::chrono::duration<double>(age).count());
}

/// All but the stage, and no rate when nobody works.
json progress_of(const Parsed& told, bool works) {
  json progress = json::object();
  const auto take = [&](const char* key, bool text) {
    if (!told.contains(key)) return;
    const Parsed& value = told[key];
    if (text ? value.is_string() : value.is_number()) progress[key] = value;
  };
  for (const char* key : {"phase", "detail"}) take(key, true);
  for (const char* key : {"done", "total", "seconds"}) take(key, false);
  if (works)
    for (const char* key : {"per_second", "seconds_left"}) take(key, false);
  return progress;
}

std::string state_of(const fs::path& run, const std::optional<driver::LockOwner>& owner,
                     const std::string& first_due) {
  if (!failure_of(run).empty()) return "failed";
  if (owner && !owner->gone) return owner->silent ? "silent" : "working";
  return first_due.empty() ? "finished" : "stopped";
}

/// The first stage that is not finished; empty without one.
std::string first_due_of(const json& stages) {
  for (const json& stage : stages)
    if (stage["status"] != "finished") return stage["name"].get<std::string>();
  return "";
}

json status_of_run(const fs::path& run) {
  const auto owner = driver::owner_of(run);  // first: a run that ends meanwhile is not "stopped"
  const json stages = stages_of(run);
  std::string stage = first_due_of(stages);
  const std::string state = state_of(run, owner, stage);
  json status = {{"kind", "run"}, {"state", state}};
  if (owner) status["in_use_by"] = owner->text;
  if (const std::string failure = failure_of(run); !failure.empty()) status["failure"] = failure;
  const fs::path file = run / driver::kProgressFile;
  const Parsed told = state == "finished" ? Parsed() : told_by(file);
  const bool stage_is_told = told.contains("stage") && told["stage"].is_string();
  if (stage_is_told) stage = told["stage"].get<std::string>();
  if (!stage.empty()) status["stage"] = stage;
  if (stage_is_told) {
    status["progress"] = progress_of(told, state == "working");
    status["progress"]["told_seconds_ago"] = seconds_since_written(file);
  }
  status["stages"] = stages;
  return status;
}

/// A member whose files are damaged, or go while it clears them, does not hide the others.
json row_of_member(const fs::path& run) {
  json row = {{"name", run.filename().string()}}, status;
  try {
    status = is_run(run) ? status_of_run(run) : json{{"state", "due"}};
  } catch (const UserError& error) {
    status = {{"state", "failed"}, {"failure", error.what()}};
  }
  if (!status.contains("stages")) {
    row.update(status);
    return row;
  }
  const json& stages = status["stages"];
  row["state"] = status["state"];
  row["finished"] = std::count_if(stages.begin(), stages.end(),
                                  [](const json& stage) { return stage["status"] == "finished"; });
  row["stages"] = stages.size();
  for (const char* key : {"stage", "progress", "failure"})
    if (status.contains(key)) row[key] = status[key];
  return row;
}

/// Of the last command, in its order; then what earlier ones left.
std::vector<fs::path> members_of(const fs::path& sweep) {
  std::vector<fs::path> members;
  const auto add = [&](const fs::path& member) {
    if (std::find(members.begin(), members.end(), member) == members.end())
      members.push_back(member);
  };
  const Parsed listed = read_object(sweep / driver::kSweepFile);
  if (listed.contains("members") && listed["members"].is_array())
    for (const Parsed& name : listed["members"])
      if (name.is_string()) add(sweep / fs::path(name.get<std::string>()).filename());
  for (const fs::path& run : runs_below(sweep)) add(run);
  return members;
}

json status_of_sweep(const fs::path& sweep) {
  json status = {{"kind", "sweep"}}, rows = json::array();
  for (const fs::path& member : members_of(sweep)) rows.push_back(row_of_member(member));
  for (const char* state : kStates)
    status[state] = std::count_if(rows.begin(), rows.end(),
                                  [&](const json& row) { return row["state"] == state; });
  status["members"] = std::move(rows);
  return status;
}

}  // namespace

json status(const fs::path& path) {
  json status = {{"path", path.string()}};
  if (is_run(path))
    status.update(status_of_run(path));
  else if (is_sweep(path) || fs::exists(path / driver::kSweepFile))
    status.update(status_of_sweep(path));
  else
    throw UserError(fmt::format(
        "{}: is no run's directory and no sweep's (outputs/NAME, outputs/NAME-sweep); espalier "
        "inspect tells of other paths",
        path.string()));
  return status;
}

}  // namespace espalier::inspect
