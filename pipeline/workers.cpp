#include "pipeline/workers.h"

#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace espalier {

struct Workers::State {
  std::mutex mutex;
  std::condition_variable wake, done;
  std::vector<std::jthread> threads;
  const std::function<void(int64_t, int)>* body = nullptr;
  int64_t n = 0;
  std::atomic<int64_t> next{0};
  uint64_t round = 0;
  int busy = 0;
  bool stop = false;
  std::exception_ptr error;

  void work(int worker) {
    try {
      for (int64_t i; (i = next.fetch_add(1)) < n;) (*body)(i, worker);
    } catch (...) {
      next = n;
      std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
    }
  }

  void loop(int worker, const std::function<void()>& on_start) {
    if (on_start) on_start();
    for (uint64_t seen = 0;;) {
      {
        std::unique_lock lock(mutex);
        wake.wait(lock, [&] { return stop || round != seen; });
        if (stop) return;
        seen = round;
      }
      work(worker);
      std::lock_guard lock(mutex);
      if (--busy == 0) done.notify_one();
    }
  }
};

Workers::Workers(int count, std::function<void()> on_start) : state_(std::make_unique<State>()) {
  if (on_start) on_start();
  for (int worker = 1; worker < count; ++worker)
    state_->threads.emplace_back(
        [s = state_.get(), worker, on_start] { s->loop(worker, on_start); });
}

Workers::~Workers() {
  {
    std::lock_guard lock(state_->mutex);
    state_->stop = true;
  }
  state_->wake.notify_all();
}

int Workers::count() const { return static_cast<int>(state_->threads.size()) + 1; }

void Workers::for_each(int64_t n, const std::function<void(int64_t, int)>& body) {
  auto& s = *state_;
  {
    std::lock_guard lock(s.mutex);
    s.body = &body;
    s.n = n;
    s.next = 0;
    s.error = nullptr;
    s.busy = static_cast<int>(s.threads.size());
    ++s.round;
  }
  s.wake.notify_all();
  s.work(0);
  std::unique_lock lock(s.mutex);
  s.done.wait(lock, [&] { return s.busy == 0; });
  if (s.error) std::rethrow_exception(s.error);
}

}  // namespace espalier
