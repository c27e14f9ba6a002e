#include "pipeline/driver/plan.h"

#include <fmt/format.h>

#include <cstdio>
#include <map>

#include "pipeline/driver/text_table.h"
#include "pipeline/io/checkpoint.h"

namespace espalier::driver {
namespace {

std::string model_text(const std::filesystem::path& path) {
  const io::Checkpoint model = io::Checkpoint::open(path);
  int64_t parameters = 0;
  for (const auto& name : model.names()) {
    int64_t size = 1;
    for (const int64_t extent : model.info(name).shape) size *= extent;
    parameters += size;
  }
  return fmt::format("{}: {} tensors, {} parameters, {} bytes", path.string(), model.names().size(),
                     parameters, model.bytes());
}

/// Whether the entry leaves a model of its own; after the others the one that they took goes on.
bool leaves_model(const Entry& entry) {
  return entry.kind == "prune" || entry.kind == "retrain" || entry.kind == "compress";
}

}  // namespace

void print_plan(const std::vector<Entry>& entries, const Shared& shared, const RunContext& run) {
  fmt::print("plan of {}\n", shared.run_directory.string());
  fmt::print("start  {}\n", model_text(shared.model));
  std::map<std::string, std::string> models = {{"start", "start"}};  // by entry name
  for (const Entry& entry : entries) {
    const std::string taken = models.at(entry.from);
    models[entry.name] = leaves_model(entry) ? entry.directory : taken;
    fmt::print("\n{}  {} takes {}\n", entry.directory, entry.kind, taken);
    const StagePlan plan = entry.stage->plan(run, shared.model);
    for (const std::string& line : plan.lines) fmt::print("  {}\n", line);
    fmt::print("{}", text_table(plan.table, "  "));
  }
  fmt::print("\n");
  std::fflush(stdout);
}

}  // namespace espalier::driver
