#include "pipeline/driver/signals.h"

#include <csignal>
#include <cstdint>
#include <span>

#include "pipeline/driver/progress.h"

namespace espalier::driver {
namespace {

volatile std::sig_atomic_t stop = 0;

void note_stop(int) { stop = 1; }

}  // namespace

void install_signal_handlers() {
  struct sigaction action {};
  action.sa_handler = note_stop;
  action.sa_flags = SA_RESTART;
  sigaction(SIGTERM, &action, nullptr);
  sigaction(SIGUSR1, &action, nullptr);
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
}

bool stop_requested(const comm::Communicator& group) {
  int64_t any = stop;
  group.all_reduce_max(std::span(&any, 1));
  return any != 0;
}

}  // namespace espalier::driver
