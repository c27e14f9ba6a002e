#pragma once
/// The progress line of a stage (rank 0), what it leaves for others to read (metrics.jsonl,
/// progress.json), and the wish to stop.

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "pipeline/comm/communicator.h"

namespace espalier::driver {

/// How far the stage at work is, in the directory of a run that is not finished; replaced at most
/// once a second:
///   {"stage", "seconds" of this start, "phase", "done", "total", "per_second", "seconds_left",
///    "detail"}
/// without those that are not known (yet).
inline constexpr const char* kProgressFile = "progress.json";

/// "0:07", "1:02:03".
std::string clock_text(double seconds);

class Progress {
 public:
  /// `run_directory` receives the files; empty on ranks other than 0, which show nothing.
  Progress(std::string stage, std::filesystem::path run_directory);
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
