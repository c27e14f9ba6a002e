#pragma once
/// A group of ranks: a value handle over one backend (MPI for host memory, NCCL for device memory).
///
/// Every collective takes part on all ranks in the same order, has a deadline
/// (`cluster.timeout_seconds`), and throws EnvironmentError naming the operation, this rank and the
/// seconds waited when a peer does not come. Collectives are called from one thread of a rank.
/// Sums are of integers, so any order gives the same bits; floating-point sums are not offered.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace espalier::comm {

class Backend;  // one implementation a file: mpi.cpp, nccl.cpp / no_nccl.cpp, self.cpp

class Communicator {
 public:
  /// One rank, nothing initialised: for tests and tools.
  static Communicator self();
  /// MPI_COMM_WORLD (duplicated). Initialises MPI when it is not; MPI errors are returned and
  /// checked, never fatal inside the library. Finalised at exit.
  static Communicator world(double timeout_seconds);

  int rank() const;
  int size() const;
  /// "self", "mpi" or "nccl".
  std::string backend() const;
  bool is_root() const { return rank() == 0; }

  /// values[i] = sum (max) over ranks. Same bits whatever the number of ranks.
  void all_reduce_sum(std::span<int64_t> values) const;
  void all_reduce_max(std::span<int64_t> values) const;
  void all_reduce_max(std::span<double> values) const;

  /// bytes of `root` to all.
  void broadcast(std::span<std::byte> bytes, int root = 0) const;
  /// Any length, known to the root alone.
  std::string broadcast(const std::string& text, int root = 0) const;
  /// Concatenation of every rank's bytes in rank order; lengths may differ. `all_gather`: on every
  /// rank; `gather`: on `root` (elsewhere empty).
  std::vector<std::vector<std::byte>> all_gather(std::span<const std::byte> mine) const;
  std::vector<std::vector<std::byte>> gather(std::span<const std::byte> mine, int root = 0) const;
  void barrier() const;

  /// Throws UserError on every rank, naming the first rank that differs, unless all ranks hold the
  /// same text (`what` names it: "configuration", "library versions", "data checksum").
  void require_same(const std::string& what, const std::string& text) const;

  /// Bytes this rank sent so far, as the algorithms of the backend's description count them.
  int64_t bytes_sent() const;

  /// Prints "espalier: <message>" once and ends every rank within seconds with `exit_code`: called
  /// by the rank on which an error arose. Ranks that are ended so print nothing themselves.
  [[noreturn]] void abort(const std::string& message, int exit_code) const;

  explicit Communicator(std::shared_ptr<Backend> backend) : backend_(std::move(backend)) {}

 private:
  std::shared_ptr<Backend> backend_;
};

/// T values as bytes, for broadcast and gather.
template <class T>
std::span<std::byte> bytes_of(std::span<T> values) {
  return {reinterpret_cast<std::byte*>(const_cast<std::remove_const_t<T>*>(values.data())),
          values.size_bytes()};
}

}  // namespace espalier::comm
