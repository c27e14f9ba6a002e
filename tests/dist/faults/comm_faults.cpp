// comm_faults <what> <rank> <timeout_seconds>: a group that sums in a loop, in which rank <rank>
//   throw        ends with an error            throw_all    every rank does so at once
//   throw_busy   the same while another rank computes and never looks at its messages
//   stop | kill  sends itself SIGSTOP | SIGKILL
//   stop_at_start | stop_at_end  sends itself SIGSTOP before MPI_Init | in MPI_Finalize
//   leave        returns from main early
//   work         computes for twice the timeout and says so     dawdle   the same in silence
//   none         nothing happens
#include <fmt/format.h>
#include <mpi.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/errors.h"

namespace {

using espalier::comm::Communicator;

constexpr int kRounds = 40, kFaultRound = 20;

void fail(const Communicator& world) {
  throw espalier::UserError(fmt::format("rank {} met what it was told to meet", world.rank()));
}

void work(const Communicator& world, double seconds, bool aloud) {
  for (int tenth = 0; tenth < 10 * seconds; ++tenth) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    if (aloud) world.still_working();
  }
}

int stop_here(MPI_Comm, int, void*, void*) { return ::kill(::getpid(), SIGSTOP); }

/// MPI_Finalize begins by deleting the attributes of MPI_COMM_SELF.
void stop_in_finalize() {
  int key = MPI_KEYVAL_INVALID;
  MPI_Comm_create_keyval(MPI_COMM_NULL_COPY_FN, stop_here, &key, nullptr);
  MPI_Comm_set_attr(MPI_COMM_SELF, key, nullptr);
}

bool is_rank_of_mpirun(const std::string& rank) {
  const char* own = std::getenv("OMPI_COMM_WORLD_RANK");
  return own != nullptr && own == rank;
}

void run(const Communicator& world, const std::string& what, int rank, double timeout) {
  std::vector<int64_t> values(200'000, 1);
  for (int round = 0; round < kRounds; ++round) {
    if (round == kFaultRound) {
      if (what == "throw_all") fail(world);
      if (what == "throw_busy" && world.rank() == (rank + 1) % world.size())
        std::this_thread::sleep_for(std::chrono::seconds(60));
      if (world.rank() == rank) {
        if (what == "throw" || what == "throw_busy") fail(world);
        if (what == "stop") ::kill(::getpid(), SIGSTOP);
        if (what == "kill") ::kill(::getpid(), SIGKILL);
        if (what == "leave") return;
        if (what == "stop_at_end") stop_in_finalize();
        if (what == "work" || what == "dawdle") work(world, 2 * timeout, what == "work");
      }
    }
    world.all_reduce_sum(values);
    std::fill(values.begin(), values.end(), 1);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return espalier::kExitConfiguration;
  if (std::string(argv[1]) == "stop_at_start" && is_rank_of_mpirun(argv[2]))
    ::kill(::getpid(), SIGSTOP);
  const auto world = Communicator::world(std::stod(argv[3]));
  try {
    run(world, argv[1], std::stoi(argv[2]), std::stod(argv[3]));
    if (world.is_root()) fmt::print("{} of {} done\n", world.backend(), world.size());
  } catch (const espalier::Error& error) {
    world.abort(error.what(), error.exit_code());
  }
}
