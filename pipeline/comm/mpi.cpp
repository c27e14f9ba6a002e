#include <fmt/format.h>
#include <mpi.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <mutex>
#include <numeric>
#include <stop_token>
#include <thread>

#include "pipeline/comm/backend.h"
#include "pipeline/comm/ending.h"
#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

/// Collectives travel in pieces: MPI counts are int. The library's nonblocking reductions hold a
/// copy of what they work on; pieces that stay in the cache were four times as fast on one node.
constexpr int64_t kPieceBytes = int64_t{32} << 20;
constexpr int64_t kReducedPieceBytes = int64_t{1} << 20;
/// From here on, ranks first wait for one another (asleep), then move the data (awake).
constexpr int64_t kLargeBytes = int64_t{256} << 10;
constexpr auto kSpin = 100us;
constexpr auto kYield = 1ms;
constexpr auto kLongestSleep = 200us;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

void check(int result, const char* call) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(result, text, &length);
  throw EnvironmentError(fmt::format("{} failed: {}", call, std::string(text, length)));
}

MPI_Comm duplicate(MPI_Comm from) {
  MPI_Comm made = MPI_COMM_NULL;
  check(MPI_Comm_dup(from, &made), "MPI_Comm_dup");
  check(MPI_Comm_set_errhandler(made, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  return made;
}

int rank_in(MPI_Comm group) {
  int rank = 0;
  check(MPI_Comm_rank(group, &rank), "MPI_Comm_rank");
  return rank;
}

int size_of(MPI_Comm group) {
  int size = 0;
  check(MPI_Comm_size(group, &size), "MPI_Comm_size");
  return size;
}

/// Ends this process when MPI's own waiting for peers, which knows no deadline, takes too long: as
/// it starts and as it ends. Later ranks leave the message to the first that waits: mpirun ends
/// them meanwhile.
class Watch {
 public:
  Watch(const char* what, const std::string& advice, double seconds, int rank)
      : thread_([=](const std::stop_token& stop) {
          constexpr double kLongest = 1e6;  // which the clock can count
          const auto patience =
              std::chrono::milliseconds(std::llround(1e3 * std::min(seconds, kLongest))) +
              2s * std::min(rank, 3);
          std::mutex mutex;
          std::condition_variable_any asked;
          std::unique_lock lock(mutex);
          Clock::time_point start;
          do {  // once more when it was this process that had been stopped
            start = Clock::now();
            if (asked.wait_for(lock, stop, patience, [&] { return stop.stop_requested(); })) return;
          } while (Clock::now() - start > patience + 1s);
          print_error(fmt::format(
              "{}: a rank waited {:.1f} seconds for its peers; a rank has stopped or lost its "
              "network. Look at its node{}",
              what, seconds_since(start), advice));
          exit_now(kExitEnvironment);
        }) {}

 private:
  std::jthread thread_;  // asked to stop, and waited for, by its destructor
};

class MpiBackend final : public Backend {
 public:
  explicit MpiBackend(double timeout_seconds)
      : data_(duplicate(MPI_COMM_WORLD)),
        control_(duplicate(MPI_COMM_WORLD)),
        rank_(rank_in(data_)),
        size_(size_of(data_)),
        timeout_(timeout_seconds),
        ending_(control_) {}

  std::string name() const override { return "mpi"; }
  int rank() const override { return rank_; }
  int size() const override { return size_; }
  double timeout_seconds() const override { return timeout_; }
  void set_timeout(double seconds) { timeout_ = seconds; }
  int64_t bytes_sent() const override { return sent_; }

  void all_reduce_sum(std::span<int64_t> values) override {
    all_reduce(values, MPI_INT64_T, MPI_SUM, "all_reduce_sum");
  }
  void all_reduce_max(std::span<int64_t> values) override {
    all_reduce(values, MPI_INT64_T, MPI_MAX, "all_reduce_max");
  }
  void all_reduce_max(std::span<double> values) override {
    all_reduce(values, MPI_DOUBLE, MPI_MAX, "all_reduce_max");
  }

  void broadcast(std::span<std::byte> bytes, int root) override {
    if (size_ == 1) return;
    const auto total = static_cast<int64_t>(bytes.size());
    arrive(total, "broadcast");
    move_from(bytes, root, "broadcast");
    if (rank_ == root) sent_ += (size_ - 1) * total;
  }

  std::vector<std::vector<std::byte>> all_gather(std::span<const std::byte> mine) override {
    const auto lengths = all_lengths(mine.size(), "all_gather");
    const int64_t total = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    arrive(total, "all_gather");
    sent_ += (size_ - 1) * static_cast<int64_t>(mine.size());
    auto parts = total <= kPieceBytes ? gather_in_one(mine, lengths, total) : rooms_for(lengths);
    if (total > kPieceBytes) {
      std::copy(mine.begin(), mine.end(), parts[rank_].begin());
      for (int root = 0; root < size_; ++root) move_from(parts[root], root, "all_gather");
    }
    return parts;
  }

  std::vector<std::vector<std::byte>> gather(std::span<const std::byte> mine, int root) override {
    const auto lengths = all_lengths(mine.size(), "gather");
    arrive(std::accumulate(lengths.begin(), lengths.end(), int64_t{0}), "gather");
    std::vector<MPI_Request> requests;
    if (rank_ != root) {
      sent_ += static_cast<int64_t>(mine.size());
      post(mine, [&](const std::byte* piece, int count) {
        check(MPI_Isend(piece, count, MPI_BYTE, root, 0, data_, &requests.emplace_back()),
              "MPI_Isend");
      });
      wait(requests, static_cast<int64_t>(mine.size()), "gather");
      return {};
    }
    auto parts = rooms_for(lengths);
    parts[root].assign(mine.begin(), mine.end());
    for (int from = 0; from < size_; ++from) {
      if (from == root) continue;
      post(parts[from], [&](const std::byte* piece, int count) {
        check(MPI_Irecv(const_cast<std::byte*>(piece), count, MPI_BYTE, from, 0, data_,
                        &requests.emplace_back()),
              "MPI_Irecv");
      });
    }
    wait(requests, std::accumulate(lengths.begin(), lengths.end(), int64_t{0}), "gather");
    return parts;
  }

  void barrier() override { meet(data_, "barrier"); }
  void still_working() override { ending_.still_working(); }

  [[noreturn]] void abort(const std::string& message, int exit_code) override {
    ending_.announce(message, exit_code);
  }
  void check_peers() override { ending_.check(); }

  /// At exit: waits for the peers, so that one that still works and fails can say so, then
  /// finalises.
  void finalize() noexcept {
    try {
      meet(control_, "the end of the program");
    } catch (const std::exception& error) {
      abort(error.what(), kExitEnvironment);
    }
    const Watch watch("MPI_Finalize",
                      fmt::format(", or raise cluster.timeout_seconds (now {:g})", timeout_),
                      timeout_, rank_);
    MPI_Comm_free(&data_);
    MPI_Comm_free(&control_);
    MPI_Finalize();
  }

 private:
  template <class T>
  void all_reduce(std::span<T> values, MPI_Datatype type, MPI_Op operation, const char* name) {
    if (size_ == 1) return;
    const auto bytes = static_cast<int64_t>(values.size_bytes());
    arrive(bytes, name);
    constexpr size_t piece = kReducedPieceBytes / sizeof(T);
    for (size_t at = 0; at < values.size(); at += piece) {
      const auto part = values.subspan(at, std::min(piece, values.size() - at));
      MPI_Request request;
      check(MPI_Iallreduce(MPI_IN_PLACE, part.data(), static_cast<int>(part.size()), type,
                           operation, data_, &request),
            "MPI_Iallreduce");
      wait({&request, 1}, static_cast<int64_t>(part.size_bytes()), name);
    }
    sent_ += 2 * bytes * (size_ - 1) / size_;
  }

  /// A broadcast without its accounting and its meeting.
  void move_from(std::span<std::byte> bytes, int root, const char* name) {
    post(bytes, [&](const std::byte* piece, int count) {
      MPI_Request request;
      check(MPI_Ibcast(const_cast<std::byte*>(piece), count, MPI_BYTE, root, data_, &request),
            "MPI_Ibcast");
      wait({&request, 1}, count, name);
    });
  }

  std::vector<int64_t> all_lengths(size_t mine, const char* name) {
    std::vector<int64_t> lengths(size_);
    const auto length = static_cast<int64_t>(mine);
    MPI_Request request;
    check(MPI_Iallgather(&length, 1, MPI_INT64_T, lengths.data(), 1, MPI_INT64_T, data_, &request),
          "MPI_Iallgather");
    wait({&request, 1}, 0, name);
    return lengths;
  }

  std::vector<std::vector<std::byte>> gather_in_one(std::span<const std::byte> mine,
                                                    const std::vector<int64_t>& lengths,
                                                    int64_t total) {
    std::vector<int> counts(lengths.begin(), lengths.end()), offsets(size_, 0);
    std::partial_sum(counts.begin(), counts.end() - 1, offsets.begin() + 1);
    std::vector<std::byte> all(total);
    MPI_Request request;
    check(MPI_Iallgatherv(mine.data(), counts[rank_], MPI_BYTE, all.data(), counts.data(),
                          offsets.data(), MPI_BYTE, data_, &request),
          "MPI_Iallgatherv");
    wait({&request, 1}, total, "all_gather");
    std::vector<std::vector<std::byte>> parts(size_);
    for (int from = 0; from < size_; ++from)
      parts[from].assign(all.begin() + offsets[from], all.begin() + offsets[from] + counts[from]);
    return parts;
  }

  static std::vector<std::vector<std::byte>> rooms_for(const std::vector<int64_t>& lengths) {
    std::vector<std::vector<std::byte>> rooms;
    for (const int64_t length : lengths) rooms.emplace_back(length);
    return rooms;
  }

  template <class Body>
  static void post(std::span<const std::byte> bytes, const Body& body) {
    for (size_t at = 0; at < bytes.size(); at += kPieceBytes)
      body(bytes.data() + at, static_cast<int>(std::min<size_t>(kPieceBytes, bytes.size() - at)));
  }

  void arrive(int64_t bytes, const char* name) {
    if (bytes >= kLargeBytes) meet(data_, name);
  }

  void meet(MPI_Comm group, const char* name) {
    MPI_Request request;
    check(MPI_Ibarrier(group, &request), "MPI_Ibarrier");
    wait({&request, 1}, 0, name);
  }

  /// Polls until all requests are done: busily at first, then giving way, then in short sleeps.
  /// `bytes` still to move lengthen the awake part, because polling is what moves them.
  void wait(std::span<MPI_Request> requests, int64_t bytes, const char* name) {
    const auto start = Clock::now();
    auto last_word = start;  // of a rank that the others wait for
    const auto awake = kYield + std::chrono::nanoseconds(4 * bytes);
    auto sleep = std::chrono::nanoseconds(20us);
    for (;;) {
      int done = 0;
      check(MPI_Testall(static_cast<int>(requests.size()), requests.data(), &done,
                        MPI_STATUSES_IGNORE),
            name);
      if (done) return;
      const auto waited = Clock::now() - start;
      if (waited < kSpin) continue;
      if (ending_.check()) last_word = Clock::now();
      if (waited < awake) {
        std::this_thread::yield();
        continue;
      }
      if (const double seconds = seconds_since(last_word); seconds > timeout_)
        give_up(name, seconds);
      std::this_thread::sleep_for(sleep);
      sleep = std::min<std::chrono::nanoseconds>(2 * sleep, kLongestSleep);
    }
  }

  [[noreturn]] void give_up(const char* name, double seconds) const {
    throw EnvironmentError(fmt::format(
        "{}: rank {} of {} waited {:.1f} seconds for its peers; a rank has stopped, lost its "
        "network "
        "or is far behind. Look at its node, or raise cluster.timeout_seconds (now {:g})",
        name, rank_, size_, seconds, timeout_));
  }

  MPI_Comm data_, control_;
  int rank_, size_;
  double timeout_;
  Ending ending_;
  int64_t sent_ = 0;
};

/// Lives until the process ends: the handler at exit needs it.
std::shared_ptr<MpiBackend>& the_backend() {
  static auto* backend = new std::shared_ptr<MpiBackend>;
  return *backend;
}

void finalize_at_exit() {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (!finalized) the_backend()->finalize();
}

}  // namespace

std::shared_ptr<Backend> mpi_backend(double timeout_seconds) {
  auto& backend = the_backend();
  if (backend) {
    backend->set_timeout(timeout_seconds);
    return backend;
  }
  const char* rank = std::getenv("OMPI_COMM_WORLD_RANK");  // which MPI does not tell yet
  const Watch watch("MPI_Init", "", timeout_seconds, rank == nullptr ? 0 : std::atoi(rank));
  int initialized = 0;
  check(MPI_Initialized(&initialized), "MPI_Initialized");
  if (!initialized) {
    int provided = 0;
    check(MPI_Init_thread(nullptr, nullptr, MPI_THREAD_SERIALIZED, &provided), "MPI_Init_thread");
    if (provided < MPI_THREAD_FUNNELED)
      throw EnvironmentError(
          "this MPI library does not allow threads beside the one that calls it; "
          "use one built with at least MPI_THREAD_FUNNELED");
  }
  check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  backend = std::make_shared<MpiBackend>(timeout_seconds);
  // Whoever initialised MPI finalises it.
  if (!initialized) std::atexit(finalize_at_exit);
  return backend;
}

}  // namespace espalier::comm
