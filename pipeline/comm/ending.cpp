#include "pipeline/comm/ending.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "pipeline/comm/backend.h"

namespace espalier::comm {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr int kAnnounced = 1, kAnswered = 2, kPrinted = 3, kWorking = 4;  // message tags
constexpr auto kPrintAfter = 300ms;  // ranks that compute do not answer; the message need not wait
constexpr auto kGrace = 2s;          // then MPI_Abort
constexpr auto kFollowAtMost = 1s;   // an announcer that vanishes holds nobody
constexpr auto kSettle = 20ms;
constexpr auto kPause = 500us;
constexpr auto kWordEvery = 1s;

}  // namespace

// Results of MPI calls are not checked in this file: whatever fails here, the process is about to
// end.
Ending::Ending(MPI_Comm control) : control_(control) {
  MPI_Comm_rank(control_, &rank_);
  MPI_Comm_size(control_, &size_);
}

bool Ending::check() {
  bool works = false;
  while (const auto notice = next()) {
    if (notice->kind == kAnnounced) follow(notice->origin, notice->exit_code);
    works = works || notice->kind == kWorking;
  }
  return works;
}

void Ending::still_working() {
  if (Clock::now() - said_working_ < kWordEvery) return;
  said_working_ = Clock::now();
  sendings_.remove_if([](Sending& sending) {
    int sent = 0;
    MPI_Test(&sending.request, &sent, MPI_STATUS_IGNORE);
    return sent != 0;
  });
  send_to_all(kWorking, 0);
}

void Ending::announce(const std::string& message, int exit_code) {
  check();
  send_to_all(kAnnounced, exit_code);
  std::vector<bool> answered(size_, false);
  answered[rank_] = true;
  bool printed = false;
  const auto start = Clock::now();
  for (;;) {
    while (const auto notice = next()) {
      if (notice->kind == kAnnounced && notice->origin < rank_ && !printed)
        follow(notice->origin, notice->exit_code);
      if (notice->kind != kWorking) answered[notice->origin] = true;
    }
    const bool all = std::find(answered.begin(), answered.end(), false) == answered.end();
    const auto waited = Clock::now() - start;
    if (!printed && (all || waited > kPrintAfter)) {
      print_error(message);
      printed = true;
      send_to_all(kPrinted, exit_code);
    }
    if (all) break;
    if (waited > kGrace) MPI_Abort(MPI_COMM_WORLD, exit_code);
    std::this_thread::sleep_for(kPause);
  }
  settle();
  exit_now(exit_code);
}

void Ending::follow(int origin, int exit_code) {
  send(kAnswered, exit_code, origin);
  for (const auto start = Clock::now(); Clock::now() - start < kFollowAtMost;) {
    const auto notice = next();
    if (!notice) {
      std::this_thread::sleep_for(kPause);
    } else if (notice->kind == kAnnounced) {
      send(kAnswered, exit_code, notice->origin);
    } else if (notice->kind == kPrinted) {
      exit_code = notice->exit_code;
      break;
    }
  }
  settle();
  exit_now(exit_code);
}

std::optional<Ending::Notice> Ending::next() {
  int waiting = 0;
  MPI_Status status;
  if (MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, control_, &waiting, &status) != MPI_SUCCESS ||
      !waiting)
    return std::nullopt;
  Notice notice{status.MPI_TAG, status.MPI_SOURCE, 0};
  MPI_Recv(&notice.exit_code, 1, MPI_INT, notice.origin, notice.kind, control_, MPI_STATUS_IGNORE);
  return notice;
}

void Ending::send(int kind, int exit_code, int destination) {
  auto& sending = sendings_.emplace_back(Sending{exit_code, MPI_REQUEST_NULL});
  MPI_Isend(&sending.exit_code, 1, MPI_INT, destination, kind, control_, &sending.request);
}

void Ending::send_to_all(int kind, int exit_code) {
  for (int peer = 0; peer < size_; ++peer)
    if (peer != rank_) send(kind, exit_code, peer);
}

/// Gives the library time to hand over what it has taken.
void Ending::settle() {
  const auto start = Clock::now();
  while (Clock::now() - start < kSettle) {
    for (auto& sending : sendings_) {
      int sent = 0;
      MPI_Test(&sending.request, &sent, MPI_STATUS_IGNORE);
    }
    std::this_thread::sleep_for(kPause);
  }
}

}  // namespace espalier::comm
