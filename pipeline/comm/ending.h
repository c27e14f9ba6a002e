#pragma once
/// How an error on one rank ends all ranks with one message.
///
/// The rank on which the error arose announces it to every other over a communicator that carries
/// nothing else. Every polling loop looks there: a rank that sees the announcement answers, waits
/// until the message is printed, and ends quietly with the same code. When all have answered (or
/// after a third of a second) the announcer prints; of several announcers the lowest rank does. A
/// rank that has not answered after a short grace (it computes, or is stopped) is ended by
/// MPI_Abort. Processes end by _Exit: MPI_Finalize would wait for peers and outstanding
/// collectives. The same communicator carries the word of a rank that works while others wait.

#include <mpi.h>

#include <chrono>
#include <list>
#include <optional>
#include <string>
#include <vector>

namespace espalier::comm {

class Ending {
 public:
  /// `control`: a duplicate of the whole group used by nothing else.
  explicit Ending(MPI_Comm control);

  /// Returns at once when nobody has announced an error; else does not return. One MPI_Iprobe when
  /// nothing has come. True when a rank has said that it still works.
  bool check();
  /// Says so to all, at most once a second.
  void still_working();
  [[noreturn]] void announce(const std::string& message, int exit_code);

 private:
  struct Notice {
    int kind;
    int origin;
    int exit_code;
  };
  struct Sending {
    int exit_code;
    MPI_Request request;
  };

  std::optional<Notice> next();
  void send(int kind, int exit_code, int destination);
  void send_to_all(int kind, int exit_code);
  [[noreturn]] void follow(int origin, int exit_code);
  void settle();

  MPI_Comm control_;
  int rank_ = 0;
  int size_ = 1;
  std::list<Sending> sendings_;
  std::chrono::steady_clock::time_point said_working_{};
};

}  // namespace espalier::comm
