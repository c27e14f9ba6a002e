#pragma once
/// What a sweep came to: one line for each configuration with run.seed left out, and over the seeds
/// of a line median, mean and standard deviation.

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace espalier::driver {

/// Of finite numbers, in any order.
struct Statistics {
  int64_t count = 0;
  double median = 0, mean = 0;
  std::optional<double> standard_deviation;  ///< of a sample: divided by n - 1; nothing for one
};
/// Throws DefectError for no number.
Statistics statistics_of(std::vector<double> values);

struct SweepMember {
  std::vector<std::string> overrides;  ///< "retrain.learning_rate=0.001"
  uint64_t seed = 0;
  std::filesystem::path directory;  ///< the run's
};

/// What one member reached: {"tasks": {NAME: {"entry": "07-evaluate", "leading": "accuracy",
/// "reported": {"accuracy": 0.5, ...}}}, "figures": {"nonzeros": ..., "bytes": ..., ...}}.
/// A task is that of the last entry that measured it; the figures are those of the last entry of
/// their kind. Reads manifests and metrics of the run; a value that is no number is null.
nlohmann::json read_figures(const std::filesystem::path& run_directory);

/// The summary, from each member and its read_figures(). Members that differ in run.seed alone are
/// one configuration:
/// {"seed_key": "run.seed", "standard_deviation": "of a sample (n - 1)", "swept": [KEY, ...],
///  "configurations": [{"settings": {KEY: VALUE}, "seeds": [...], "members": [DIRECTORY, ...],
///    "tasks": {NAME: {"entry", "leading", "reported": {METRIC: FIGURE}}}, "figures": {NAME:
///    FIGURE}}]}
/// with FIGURE = {"values": [one a seed, null where it has none], "count": of numbers, "median",
/// "mean", "standard_deviation"}, the last three null where there are too few numbers.
nlohmann::json summarize(const std::vector<std::pair<SweepMember, nlohmann::json>>& members);

/// The summary's table: titles, then a row each configuration; columns are the swept keys, the
/// seeds, each task's leading metric, and the figures. Several seeds: "median (mean +- deviation)".
std::vector<std::vector<std::string>> table_of(const nlohmann::json& summary);
/// Every figure in columns of its own, with full precision.
std::string csv_of(const nlohmann::json& summary);

/// What lies in a sweep's directory while it is at work, as most members have no directory yet:
/// {"members": [NAME, ...]}, the members' directories in the order of the command.
inline constexpr const char* kSweepFile = "sweep.json";
/// Writes it. By rank 0 alone.
void write_members(const std::filesystem::path& sweep_directory,
                   const std::vector<SweepMember>& members);

/// Reads the members, writes summary.json and summary.csv into the sweep's directory and prints the
/// table. By rank 0 alone. Throws EnvironmentError when a file cannot be written.
void write_summary(const std::filesystem::path& sweep_directory,
                   const std::vector<SweepMember>& members);

}  // namespace espalier::driver
