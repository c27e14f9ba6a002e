#include "pipeline/driver/plan_of_run.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <map>

#include "pipeline/driver/machine.h"
#include "pipeline/errors.h"
#include "pipeline/io/checkpoint_layout.h"

namespace espalier::driver {
namespace {

const std::vector<std::string> kStageGroups = {"prune",    "discover", "retrain",
                                               "compress", "evaluate", "export"};

void read_cluster(const config::Section& section, Shared& shared) {
  if (section.choice("device", {"auto", "cpu", "cuda"}) == "cuda")
    section.fail("device", "cuda: the stages of this version run on the CPU; set auto or cpu");
  if (section.choice("backend", {"auto", "mpi", "nccl"}) == "nccl")
    section.fail("backend",
                 "nccl carries tensors of GPUs only, and the stages of this version run on "
                 "the CPU; set auto or mpi");
  shared.threads_per_rank =
      static_cast<int>(section.integer_or("threads_per_rank", 0, {.low = 0, .high = 4096}));
  if (shared.threads_per_rank == 0) shared.threads_per_rank = usable_cores();
  shared.timeout_seconds = section.number_or("timeout_seconds", 600, {.low = 0, .low_open = true});
  const auto gib =
      section.optional_number("memory_gib", {.low = 0, .high = 1 << 20, .low_open = true});
  if (gib) shared.memory_bytes = std::max<int64_t>(1, std::llround(*gib * (1 << 30)));
  section.finish();
}

std::filesystem::path data_file(const config::Section& section, const std::string& key) {
  const auto file = section.optional_text(key);
  if (!file) return {};
  if (!std::filesystem::is_regular_file(*file))
    section.fail(key, fmt::format("{} is no file; launch/prepare_data.py makes one", *file));
  return *file;
}

/// A model is named by an entry before this one, or is the start.
void require_model(const config::Section& section, const std::string& key, const std::string& name,
                   const std::vector<Entry>& before) {
  std::vector<std::string> names{"start"};
  for (const auto& entry : before) names.push_back(entry.name);
  if (std::find(names.begin(), names.end(), name) == names.end())
    section.fail(key, fmt::format("\"{}\" names no model; before this entry there are {}{}", name,
                                  fmt::join(names, ", "),
                                  key == "base" ? ", or a checkpoint directory" : ""));
}

}  // namespace

Shared read_shared(const config::Section& root) {
  Shared shared;
  shared.pipeline = root.texts("pipeline");
  if (shared.pipeline.empty()) root.fail("pipeline", "the list is empty; name at least one stage");
  const config::Section run = root.child("run");
  shared.run_name = run.text("name");
  shared.run_directory = run.text("dir");
  shared.seed = static_cast<uint64_t>(run.integer_or("seed", 0, {.low = 0}));
  shared.resume = run.flag_or("resume", true);
  run.finish();
  read_cluster(root.child("cluster"), shared);
  const config::Section model = root.child("model");
  shared.model = model.text("path");
  if (!io::is_model_path(shared.model))
    model.fail("path", fmt::format("{} is no directory; a checkpoint as transformers writes it is "
                                   "expected",
                                   shared.model.string()));
  shared.dtype =
      model.choice("dtype", {"bfloat16", "float32"}) == "float32" ? at::kFloat : at::kBFloat16;
  model.finish();
  const config::Section data = root.child("data");
  shared.calibration_data = data_file(data, "calibration");
  shared.train_data = data_file(data, "train");
  data.finish();
  return shared;
}

std::vector<Entry> read_entries(const config::Section& root, const Shared& shared) {
  std::vector<Entry> entries;
  std::map<std::string, int> times;
  std::string previous = "start";
  for (const auto& node : shared.pipeline) {
    if (!root.has(node) || root.is_null(node))
      root.fail("pipeline", fmt::format("\"{}\" is no node of the configuration", node));
    const config::Section section = root.child(node);
    Entry entry;
    const int time = ++times[node];
    entry.node = node;
    entry.name = time == 1 ? node : fmt::format("{}#{}", node, time);
    entry.kind = section.text_or("stage", node);
    entry.directory = fmt::format("{:02}-{}", entries.size() + 1, node);
    entry.from = section.text_or("from", previous);
    require_model(section, "from", entry.from, entries);
    if (entry.kind == "compress" && !section.is_null("base") &&
        !io::is_model_path(section.text("base")))
      require_model(section, "base", section.text("base"), entries);
    entry.stage = make_stage(entry.kind, section);
    entry.canonical = section.canonical();
    section.finish();
    previous = entry.name;
    entries.push_back(std::move(entry));
  }
  // Nodes that this pipeline does not use may stay in the configuration.
  root.allow(kStageGroups);
  root.finish();
  return entries;
}

}  // namespace espalier::driver
