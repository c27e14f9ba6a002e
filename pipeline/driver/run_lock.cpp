#include "pipeline/driver/run_lock.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <fstream>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using std::chrono::milliseconds;

/// A start that was killed may still be ending when the next one comes.
constexpr milliseconds kEnding{2000};

/// Empty where the file cannot be read: a lock that vanishes meanwhile is none.
std::string text_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string link_text(const fs::path& link) {
  std::error_code error;
  return fs::read_symlink(link, error).string();
}

/// When the process began, in ticks since boot; empty when it is gone or a zombie. Tells a process
/// from a later one of the same number.
std::string start_of_process(int64_t process) {
  const std::string stat = text_of(fmt::format("/proc/{}/stat", process));
  const size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return "";
  std::istringstream fields(stat.substr(name_end + 1));
  std::vector<std::string> field(20);  // from the third on: the state, ..., the start
  for (std::string& text : field) fields >> text;
  return field.front() == "Z" || field.front() == "X" ? "" : field.back();
}

std::string local_time() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  localtime_r(&now, &parts);
  char text[32] = {};
  std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts);
  return text;
}

std::string variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

json own_description() {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  std::string boot = text_of("/proc/sys/kernel/random/boot_id");
  if (!boot.empty() && boot.back() == '\n') boot.pop_back();
  return {{"host", host},
          {"boot", boot},
          {"namespace", link_text("/proc/self/ns/pid")},
          {"process", getpid()},
          {"started", start_of_process(getpid())},
          {"job", variable("SLURM_JOB_ID")},
          {"restart", variable("SLURM_RESTART_COUNT")},
          {"time", local_time()}};
}

/// A damaged lock names nobody; its age alone counts.
json description_in(const std::string& content) {
  const json found = json::parse(content, nullptr, false);
  return found.is_object() ? found : json::object();
}

std::string text_in(const json& description, const char* key) {
  const auto found = description.find(key);
  return found != description.end() && found->is_string() ? found->get<std::string>() : "";
}

int64_t process_in(const json& description) {
  const auto found = description.find("process");
  return found != description.end() && found->is_number_integer() ? found->get<int64_t>() : 0;
}

/// Whether the owner lives, where this process can see it.
std::optional<bool> owner_lives(const json& owner) {
  const json own = own_description();
  const bool same_job =
      !text_in(own, "job").empty() && text_in(owner, "job") == text_in(own, "job");
  if (same_job && text_in(owner, "restart") != text_in(own, "restart")) return false;  // requeued
  if (process_in(owner) <= 0 || text_in(owner, "host") != text_in(own, "host")) return std::nullopt;
  if (text_in(owner, "boot") != text_in(own, "boot")) return false;  // the host began anew
  if (text_in(owner, "namespace") != text_in(own, "namespace")) return std::nullopt;
  return start_of_process(process_in(owner)) == text_in(owner, "started");
}

std::optional<fs::file_time_type> time_of(const fs::path& file) {
  std::error_code error;
  const auto time = fs::last_write_time(file, error);
  return error ? std::nullopt : std::optional(time);
}

/// The present by the clock that dates the files of this directory.
fs::file_time_type now_in(const fs::path& directory) {
  const io::AtomicFile probe(directory / "run.lock.probe");
  return time_of(probe.temporary()).value_or(fs::file_time_type::clock::now());
}

/// True when it made the file, false when there is one.
bool create(const fs::path& file, const std::string& content) {
  const int descriptor = ::open(file.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (descriptor < 0 && errno == EEXIST) return false;
  if (descriptor < 0) io::throw_environment_error(file, "cannot be made", errno);
  const ssize_t written = ::write(descriptor, content.data(), content.size());
  const int problem = written == static_cast<ssize_t>(content.size()) ? 0 : errno;
  ::close(descriptor);
  if (problem == 0) return true;
  ::unlink(file.c_str());
  io::throw_environment_error(file, "cannot be written", problem);
}

/// Takes a lock of this content away; another that came into its place meanwhile is put back.
void remove_stale(const fs::path& file, const std::string& content) {
  const fs::path aside = fmt::format("{}.stale.{}", file.string(), getpid());
  if (::rename(file.c_str(), aside.c_str()) != 0) return;  // somebody else was faster
  if (text_of(aside) != content) [[maybe_unused]]
    const int put_back = ::link(aside.c_str(), file.c_str());
  ::unlink(aside.c_str());
}

std::string name_of(const json& owner) {
  if (owner.empty()) return "another start";
  const std::string job = text_in(owner, "job");
  return fmt::format("process {} on {}{} since {}", process_in(owner), text_in(owner, "host"),
                     job.empty() ? "" : fmt::format(" (job {})", job), text_in(owner, "time"));
}

[[noreturn]] void refuse(const fs::path& directory, const json& owner, milliseconds age) {
  throw EnvironmentError(fmt::format(
      "{}: is in use by {}, last seen {} s ago; wait for its end or choose another run.dir",
      directory.string(), name_of(owner),
      std::chrono::duration_cast<std::chrono::seconds>(age).count()));
}

/// Returns when the lock of this content is stale or gone; throws when it is held.
void require_stale(const fs::path& file, const std::string& content, RunLock::Timing timing) {
  const json owner = description_in(content);
  const auto seen = time_of(file);
  if (!seen) return;
  const auto age = std::chrono::duration_cast<milliseconds>(now_in(file.parent_path()) - *seen);
  if (owner_lives(owner)) {
    const auto patience = std::chrono::steady_clock::now() + kEnding;
    while (*owner_lives(owner)) {
      if (std::chrono::steady_clock::now() > patience) refuse(file.parent_path(), owner, age);
      std::this_thread::sleep_for(milliseconds(50));
    }
    return;
  }
  if (age < timing.silence) refuse(file.parent_path(), owner, age);
  std::this_thread::sleep_for(2 * timing.beat);
  if (const auto later = time_of(file); later && *later != *seen)
    refuse(file.parent_path(), owner, milliseconds(0));
  fmt::print("{}: was in use by {}, which is gone; the run is taken over\n",
             file.parent_path().string(), name_of(owner));
  std::fflush(stdout);
}

}  // namespace

RunLock::RunLock(const fs::path& directory, Timing timing)
    : file_(directory / "run.lock"), timing_(timing), content_(own_description().dump() + "\n") {
  fs::create_directories(directory);
  while (!create(file_, content_)) {
    const std::string found = text_of(file_);
    require_stale(file_, found, timing_);
    remove_stale(file_, found);
  }
  heart_ = std::jthread([this](const std::stop_token& stop) { beat(stop); });
}

RunLock::~RunLock() {
  heart_.request_stop();
  heart_.join();
  if (text_of(file_) == content_) ::unlink(file_.c_str());
}

void RunLock::beat(const std::stop_token& stop) const {
  std::mutex mutex;
  std::condition_variable_any asked;
  std::unique_lock lock(mutex);
  while (!asked.wait_for(lock, stop, timing_.beat, [&] { return stop.stop_requested(); })) {
    const std::string found = text_of(file_);
    if (!found.empty() && found != content_) {
      fmt::print(stderr, "espalier: {}: another start has taken the run over; this one ends\n",
                 file_.string());
      std::_Exit(kExitEnvironment);
    }
    ::utimensat(AT_FDCWD, file_.c_str(), nullptr, 0);
  }
}

}  // namespace espalier::driver
