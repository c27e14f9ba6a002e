#pragma once
/// The progress line of a stage (rank 0), the metrics stream, and the wish to stop.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "pipeline/comm/communicator.h"

namespace espalier::driver {

class Progress {
 public:
  /// `metrics_file` receives one JSON line an event; empty on ranks other than 0, which show
  /// nothing.
  Progress(std::string stage, std::filesystem::path metrics_file);
  ~Progress();

  /// Starts a phase of `total` units ("blocks", "steps", "segments"), `done` of them from an
  /// earlier start.
  void start(const std::string& what, int64_t total, int64_t done = 0);
  /// One line on a terminal rewritten at most 10 times a second, in a log one line every 10 s or 10
  /// %.
  void advance(int64_t done, const std::string& detail = {});
  void finish();
  /// A plain line that stays ("damping raised to 0.1 in block 3").
  void say(const std::string& line);
  /// Appends {"stage":..., "time":..., ...fields} to metrics.jsonl.
  void metric(const nlohmann::json& fields);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// True once SIGTERM or SIGUSR1 arrived on any rank. Collective: all ranks get the same answer;
/// called between units, where everything is saved. Then throw Requeue.
bool stop_requested(const comm::Communicator& group);

}  // namespace espalier::driver
