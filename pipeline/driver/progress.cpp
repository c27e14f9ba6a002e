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

namespace espalier::driver {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::string clock_text(double seconds) {
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  return whole < 3600 ? fmt::format("{}:{:02}", whole / 60, whole % 60)
                      : fmt::format("{}:{:02}:{:02}", whole / 3600, whole / 60 % 60, whole % 60);
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

struct Progress::State {
  std::string stage;
  std::filesystem::path metrics_file;
  bool shown = false, terminal = false;
  int metrics = -1;
  std::string what;
  int64_t total = 0, done = 0, before = 0;
  Clock::time_point started, last_line;
  double last_share = 0;
  bool line_open = false;

  void line(const std::string& detail, bool last) {
    const double seconds = seconds_since(started);
    const auto fresh = static_cast<double>(done - before);
    std::string text = fmt::format("{}  {} {}/{}", stage, what, done, total);
    if (fresh > 0 && seconds > 0) {
      const double rate = fresh / seconds;
      text += fmt::format("  {:.3g}/s", rate);
      text += last ? fmt::format("  in {}", clock_text(seconds))
                   : fmt::format("  {} left", clock_text(static_cast<double>(total - done) / rate));
    }
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

Progress::Progress(std::string stage, std::filesystem::path metrics_file)
    : state_(std::make_unique<State>()) {
  state_->stage = std::move(stage);
  state_->shown = !metrics_file.empty();
  state_->metrics_file = std::move(metrics_file);
  state_->terminal = output_is_terminal();
  if (!state_->shown) return;
  state_->metrics =
      open(state_->metrics_file.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (state_->metrics < 0)
    throw EnvironmentError(fmt::format("{}: cannot be written ({})", state_->metrics_file.string(),
                                       std::error_code(errno, std::generic_category()).message()));
}

Progress::~Progress() {
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
  if (s.shown && done > 0) say(fmt::format("going on after {} of {} {}", done, total, what));
}

void Progress::advance(int64_t done, const std::string& detail) {
  State& s = *state_;
  s.done = done;
  if (!s.shown) return;
  const double share =
      static_cast<double>(done) / static_cast<double>(std::max<int64_t>(s.total, 1));
  const double quiet = seconds_since(s.last_line);
  const bool due = s.terminal ? quiet >= 0.1 : quiet >= 10 || share >= s.last_share + 0.1;
  if (!due || done >= s.total) return;  // finish() has the last line
  s.last_share = share;
  s.line(detail, false);
}

void Progress::finish() {
  if (state_->shown) state_->line({}, true);
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
