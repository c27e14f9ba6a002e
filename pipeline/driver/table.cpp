#include "pipeline/driver/table.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "pipeline/io/atomic_file.h"
#include "pipeline/io/manifest.h"

namespace espalier::driver {
namespace {

using nlohmann::json;

/// The leading metric of every task: perplexity alone is not named.
std::string measured(const json& metrics) {
  std::string text;
  const json tasks = metrics.value("tasks", json::object());
  for (const auto& [name, task] : tasks.items()) {
    const json reported = task.value("reported", json::array());
    if (!reported.is_array() || reported.empty() || !reported[0].is_string()) continue;
    const std::string metric = reported[0];
    const auto value = task.find(metric);
    if (value == task.end() || !value->is_number()) continue;  // null: NaN, a constant prediction
    text += fmt::format("{}{}{:.{}f}", text.empty() ? "" : " ",
                        metric == "perplexity" ? "" : metric + " ", value->get<double>(),
                        metric == "perplexity" ? 3 : 4);
  }
  return text;
}

/// Of one sequence, with the nonzero weights alone, by the first task: ", 1.25 GFLOP".
std::string flops(const json& metrics) {
  const json tasks = metrics.value("tasks", json::object());
  for (const auto& [name, task] : tasks.items())
    if (const double count = task.value("flops_of_nonzeros", 0.0); count > 0)
      return fmt::format(", {:.3g} {}FLOP", count / (count < 1e12 ? 1e9 : 1e12),
                         count < 1e12 ? "G" : "T");
  return "";
}

std::string fact(const json& metrics) {
  if (metrics.contains("model"))
    return fmt::format("{:.1f} M nonzeros{}", metrics["model"].value("nonzeros", 0.0) / 1e6,
                       flops(metrics));
  if (metrics.contains("pattern"))
    return metrics.value("method", "") + " " + metrics.value("pattern", "");
  if (metrics.contains("steps"))
    return fmt::format("loss {:.3f} to {:.3f}", metrics.value("loss_first", 0.0),
                       metrics.value("loss_last", 0.0));
  if (metrics.contains("share"))
    return fmt::format("{:.2f} % of the bytes", 100 * metrics.value("share", 0.0));
  return metrics.value("directory", "");
}

}  // namespace

void print_table(const std::filesystem::path& run_directory, const std::vector<Entry>& entries) {
  fmt::print("\n{:<16}{:>12}  {:<28}{:>10}{:>12}\n", "stage", "measured", "", "seconds",
             "peak MiB");
  for (const auto& entry : entries) {
    const auto directory = run_directory / entry.directory;
    const auto manifest = io::read_manifest(directory);
    if (!manifest) continue;
    const json metrics = json::parse(io::read_file(directory / "metrics.json"), nullptr, false);
    if (!metrics.is_object()) continue;
    const auto& peaks = manifest->peak_resident_bytes;
    const int64_t peak = peaks.empty() ? 0 : *std::max_element(peaks.begin(), peaks.end());
    fmt::print("{:<16}{:>12}  {:<28}{:>10.1f}{:>12}\n", entry.directory, measured(metrics),
               fact(metrics), manifest->seconds, peak >> 20);
  }
  fmt::print("\nresults lie in {}\n", run_directory.string());
  std::fflush(stdout);
}

}  // namespace espalier::driver
