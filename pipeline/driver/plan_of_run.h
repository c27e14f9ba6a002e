#pragma once
/// The entries of a run's pipeline: names, stages, what each takes, and the key that says whether
/// its outputs still stand.

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "pipeline/driver/stage.h"

namespace espalier::driver {

struct Entry {
  std::string name;       ///< "evaluate", the second time "evaluate#2": what from: and base: say
  std::string node;       ///< the node of the configuration
  std::string kind;       ///< the stage's name
  std::string directory;  ///< "03-evaluate"
  std::string from;       ///< the entry it takes its model from; "start"
  std::string canonical;  ///< its resolved configuration
  std::unique_ptr<Stage> stage;
};

/// The keys that all stages share.
struct Shared {
  std::vector<std::string> pipeline;
  std::string run_name;
  std::filesystem::path run_directory, model, calibration_data, train_data;
  uint64_t seed = 0;
  bool resume = true;
  int threads_per_rank = 0;
  double timeout_seconds = 600;
  int64_t memory_bytes = 0;  ///< of one rank; 0: unset
  at::ScalarType dtype = at::kBFloat16;
};

/// Reads run, cluster, model and data, and refuses unknown keys of the root.
Shared read_shared(const config::Section& root);
/// Makes each entry's stage from its node and refuses unknown keys of the node.
std::vector<Entry> read_entries(const config::Section& root, const Shared& shared);

}  // namespace espalier::driver
