#include "pipeline/driver/run_lock.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
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
#include "pipeline/io/json.h"

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

/// When the process began, in ticks since boot, which tells it from a later one of the same number;
/// "gone" of a zombie; nullopt where /proc does not say.
std::optional<std::string> start_of_process(int64_t process) {
  const std::string stat = text_of(fmt::format("/proc/{}/stat", process));
  const size_t name_end = stat.rfind(')');
  if (name_end == std::string::npos) return std::nullopt;
  std::istringstream fields(stat.substr(name_end + 1));
  std::vector<std::string> field(20);  // from the third on: the state, ..., the start
  for (std::string& text : field) fields >> text;
  return field.front() == "Z" || field.front() == "X" ? "gone" : field.back();
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
          {"started", start_of_process(getpid()).value_or("")},
          {"job", variable("SLURM_JOB_ID")},
          {"restart", variable("SLURM_RESTART_COUNT")},
          {"time", local_time()}};
}

/// A damaged lock names nobody; its age alone counts.
json description_in(const std::string& content) {
  const json found = json::parse(content, nullptr, false);
  return found.is_object() ? found : json::object();
}

/// 0 where none is named.
int64_t process_in(const json& description) {
  return std::max<int64_t>(0, io::non_negative_integer(io::value_at(description, {"process"})));
}

/// Whether the owner lives, where this process can see it.
std::optional<bool> owner_lives(const json& owner) {
  const json own = own_description();
  const auto same = [&](const char* key) {
    return io::text_at(owner, {key}) == io::text_at(own, {key});
  };
  if (!io::text_at(own, {"job"}).empty() && same("job") && !same("restart"))
    return false;  // requeued
  const auto process = static_cast<pid_t>(process_in(owner));
  // Hosts may share a name; a boot is of one.
  if (process <= 0 || !same("host") || !same("boot") || !same("namespace")) return std::nullopt;
  if (::kill(process, 0) != 0 && errno == ESRCH) return false;
  const auto started = start_of_process(process);
  if (!started || io::text_at(owner, {"started"}).empty()) return std::nullopt;
  return *started == io::text_at(owner, {"started"});
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

/// Gives `from` the name `to` unless that is taken: false. Throws EnvironmentError where neither
/// hard links nor renaming without replacing is to be had.
bool place(const fs::path& from, const fs::path& to) {
  if (::link(from.c_str(), to.c_str()) == 0) {
    ::unlink(from.c_str());
    return true;
  }
  if (errno == EEXIST) return false;
  if (::renameat2(AT_FDCWD, from.c_str(), AT_FDCWD, to.c_str(), RENAME_NOREPLACE) == 0) return true;
  if (errno == EEXIST) return false;
  io::throw_environment_error(to, "cannot be made", errno);
}

/// True when it made the file, false when there is one.
bool create(const fs::path& file, const std::string& content) {
  io::AtomicFile whole(file);
  whole.write(content);
  return place(whole.temporary(), file);
}

constexpr const char* kAside = "run.lock.stale.";

/// Takes a lock of this content away; another that came into its place meanwhile is put back.
void remove_stale(const fs::path& file, const std::string& content) {
  const fs::path aside = file.parent_path() / fmt::format("{}{}", kAside, getpid());
  if (::rename(file.c_str(), aside.c_str()) != 0) {
    if (errno == ENOENT) return;  // somebody else was faster
    io::throw_environment_error(file, "the lock of a start that is gone cannot be removed", errno);
  }
  if (text_of(aside) == content || !place(aside, file)) ::unlink(aside.c_str());
}

/// Stale locks that starts put aside and were killed before they removed them. One of `content`,
/// our own, is about to be put back.
void remove_asides(const fs::path& directory, const std::string& content) {
  for (const auto& entry : fs::directory_iterator(directory))
    if (entry.path().filename().string().starts_with(kAside) && text_of(entry.path()) != content)
      ::unlink(entry.path().c_str());
}

std::string name_of(const json& owner) {
  if (owner.empty()) return "another start";
  const std::string job = io::text_at(owner, {"job"});
  return fmt::format("process {} on {}{} since {}", process_in(owner), io::text_at(owner, {"host"}),
                     job.empty() ? "" : fmt::format(" (job {})", job),
                     io::text_at(owner, {"time"}));
}

milliseconds age_of(const fs::path& file, fs::file_time_type seen) {
  return std::chrono::duration_cast<milliseconds>(now_in(file.parent_path()) - seen);
}

std::string seen_text(milliseconds age) {
  return fmt::format("last seen {} s ago",
                     std::chrono::duration_cast<std::chrono::seconds>(age).count());
}

/// `until`: when it would be taken for gone, where that goes by its age.
[[noreturn]] void refuse(const fs::path& directory, const json& owner, milliseconds age,
                         std::optional<milliseconds> until = std::nullopt) {
  throw EnvironmentError(fmt::format(
      "{}: is in use by {}, {}; wait for its end or choose another run.dir{}", directory.string(),
      name_of(owner), seen_text(age),
      until ? fmt::format("; if it was killed, the same command goes on from {} s from now",
                          1 + std::chrono::duration_cast<std::chrono::seconds>(*until).count())
            : ""));
}

/// Returns when the lock of this content is stale or gone; throws when it is held.
void require_stale(const fs::path& file, const std::string& content, RunLock::Timing timing) {
  const fs::path directory = file.parent_path();
  const json owner = description_in(content);
  const auto seen = time_of(file);
  if (!seen) return;
  const milliseconds age = age_of(file, *seen);
  const auto patience = std::chrono::steady_clock::now() + kEnding;
  while (const auto lives = owner_lives(owner)) {
    if (!*lives) return;
    if (std::chrono::steady_clock::now() > patience) refuse(directory, owner, age);
    std::this_thread::sleep_for(milliseconds(50));
  }
  if (age < timing.silence) refuse(directory, owner, age, timing.silence - age);
  fmt::print("{}: was in use by {}, {}; waiting for a sign of life\n", directory.string(),
             name_of(owner), seen_text(age));
  std::fflush(stdout);
  std::this_thread::sleep_for(2 * timing.beat);
  text_of(file);  // opened anew, so that a network file system asks the server for the time
  if (const auto later = time_of(file); later && *later != *seen)
    refuse(directory, owner, milliseconds(0), timing.silence);
  fmt::print("{}: none came, the run is taken over\n", directory.string());
  std::fflush(stdout);
}

}  // namespace

RunLock::RunLock(const fs::path& directory, Timing timing)
    : file_(directory / "run.lock"), timing_(timing), content_(own_description().dump() + "\n") {
  while (!create(file_, content_)) {
    const std::string found = text_of(file_);
    require_stale(file_, found, timing_);
    remove_stale(file_, found);
  }
  remove_asides(directory, content_);
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

std::optional<LockOwner> owner_of(const fs::path& directory) {
  const fs::path file = directory / "run.lock";
  const auto seen = time_of(file);
  if (!seen) return std::nullopt;
  const json owner = description_in(text_of(file));
  const auto age =
      std::chrono::duration_cast<milliseconds>(fs::file_time_type::clock::now() - *seen);
  const bool gone = !owner_lives(owner).value_or(true);
  return LockOwner{
      fmt::format("{}, {}{}", name_of(owner), seen_text(age), gone ? "; it is gone" : ""), gone,
      age >= RunLock::Timing{}.silence};
}

}  // namespace espalier::driver
