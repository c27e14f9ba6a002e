#include "pipeline/driver/progress.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"

namespace espalier::driver {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

/// mpirun gives its ranks a terminal whatever its own output is, so the question is put to its
/// output, which is what a person reads. Where the parent is no mpirun (another node) it is a log.
bool output_is_terminal() {
  if (isatty(STDOUT_FILENO) == 0) return false;
  if (std::getenv("OMPI_COMM_WORLD_RANK") == nullptr) return true;
  const std::string output = fmt::format("/proc/{}/fd/1", getppid());
  struct stat status {};
  if (stat(output.c_str(), &status) != 0 || !S_ISCHR(status.st_mode)) return false;
  const int file = open(output.c_str(), O_WRONLY | O_NOCTTY | O_NONBLOCK | O_CLOEXEC);
  if (file < 0) return false;
  const bool terminal = isatty(file) != 0;
  close(file);
  return terminal;
}

double unix_time() {
  return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
}

}  // namespace

std::string clock_text(double seconds) {
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  return whole < 3600 ? fmt::format("{}:{:02}", whole / 60, whole % 60)
                      : fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
}

struct Progress::State {
  std::string stage;
  std::filesystem::path run_directory, metrics_file;
  bool shown = false, terminal = false;
  int metrics = -1;
  std::string what, detail;
  int64_t total = 0, done = 0, before = 0;
  const Clock::time_point begun = Clock::now();
  Clock::time_point started, last_line, last_record;
  double last_share = 0;
  bool line_open = false;

  /// Units a second of those that this start did; 0 until it did one.
  double per_second() const {
    const double seconds = seconds_since(started);
    return done > before && seconds > 0 ? static_cast<double>(done - before) / seconds : 0;
  }

  double seconds_left(double rate) const { return static_cast<double>(total - done) / rate; }

  /// Neither synced nor needed: what cannot be written here ends no run.
  void record() noexcept {
    last_record = Clock::now();
    try {
      nlohmann::json told = {{"stage", stage}, {"seconds", seconds_since(begun)}};
      if (!what.empty()) told.update({{"phase", what}, {"done", done}, {"total", total}});
      if (const double rate = per_second(); rate > 0)
        told.update({{"per_second", rate}, {"seconds_left", seconds_left(rate)}});
      if (!detail.empty()) told["detail"] = detail;
      io::AtomicFile file(run_directory / kProgressFile);
      file.write(told.dump() + "\n");
      std::filesystem::rename(file.temporary(), file.target());
    } catch (const std::exception&) {
    }
  }

  void line(bool last) {
    std::string text = fmt::format("{}  {} {}/{}", stage, what, done, total);
    if (const double rate = per_second(); rate > 0)
      text += fmt::format("  {:.3g}/s  {}", rate,
                          last ? "in " + clock_text(seconds_since(started))
                               : clock_text(seconds_left(rate)) + " left");
    if (!detail.empty()) text += "  " + detail;
    if (terminal) {
      fmt::print("\r\033[K{}", text);
      line_open = true;
      if (last) end_line();
    } else {
      fmt::print("{}\n", text);
    }
    std::fflush(stdout);
    last_line = Clock::now();
  }

  void end_line() {
    if (line_open) fmt::print("\n");
    line_open = false;
  }
};

Progress::Progress(std::string stage, std::filesystem::path run_directory)
    : state_(std::make_unique<State>()) {
  state_->stage = std::move(stage);
  state_->shown = !run_directory.empty();
  state_->run_directory = std::move(run_directory);
  state_->metrics_file = state_->run_directory / "metrics.jsonl";
  state_->terminal = output_is_terminal();
  if (!state_->shown) return;
  state_->metrics =
      open(state_->metrics_file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (state_->metrics < 0)
    throw EnvironmentError(fmt::format("{}: cannot be written ({})", state_->metrics_file.string(),
                                       std::error_code(errno, std::generic_category()).message()));
  state_->record();
}

Progress::~Progress() {
  if (state_->shown) state_->record();  // an end by a signal is told to the unit
  if (state_->shown) state_->end_line();
  if (state_->metrics >= 0) close(state_->metrics);
}

void Progress::start(const std::string& what, int64_t total, int64_t done) {
  State& s = *state_;
  s.what = what;
  s.total = total;
  s.done = s.before = done;
  s.started = s.last_line = Clock::now();
  s.last_share = total > 0 ? static_cast<double>(done) / static_cast<double>(total) : 0;
  s.detail.clear();
  if (s.shown) s.record();
  if (s.shown && done > 0) say(fmt::format("going on after {} of {} {}", done, total, what));
}

void Progress::advance(int64_t done, const std::string& detail) {
  State& s = *state_;
  s.done = done;
  if (!s.shown) return;
  s.detail = detail;
  // To pass once more through what an earlier start finished is no work of this rate.
  if (s.before > 0 && done <= s.before) s.started = Clock::now();
  if (seconds_since(s.last_record) >= 1) s.record();
  const double share =
      static_cast<double>(done) / static_cast<double>(std::max<int64_t>(s.total, 1));
  const double quiet = seconds_since(s.last_line);
  const bool due = s.terminal ? quiet >= 0.1 : quiet >= 10 || share >= s.last_share + 0.1;
  if (!due || done >= s.total) return;  // finish() has the last line
  s.last_share = share;
  s.line(false);
}

void Progress::finish() {
  if (!state_->shown) return;
  state_->detail.clear();
  state_->record();
  state_->line(true);
}

void Progress::say(const std::string& line) {
  if (!state_->shown) return;
  if (state_->line_open) fmt::print("\r\033[K");
  state_->line_open = false;
  fmt::print("{}  {}\n", state_->stage, line);
  std::fflush(stdout);
}

void Progress::metric(const nlohmann::json& fields) {
  if (!state_->shown) return;
  nlohmann::json line = {{"stage", state_->stage}, {"time", unix_time()}};
  line.update(fields);
  const std::string text = line.dump() + "\n";
  // One write of a whole line: a reader never sees half of one.
  if (write(state_->metrics, text.data(), text.size()) != static_cast<ssize_t>(text.size()))
    throw EnvironmentError(fmt::format("{}: cannot be written ({})", state_->metrics_file.string(),
                                       std::error_code(errno, std::generic_category()).message()));
}

}  // namespace espalier::driver
