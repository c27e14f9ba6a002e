#pragma once
/// A group of ranks: a value handle over one backend (MPI for host memory, NCCL for device memory).
///
/// Every collective takes part on all ranks in the same order, with the same sizes and root, has a
/// deadline
/// (`cluster.timeout_seconds`), and throws EnvironmentError naming the operation, this rank and the
/// seconds waited when a peer does not come. Collectives are called from one thread of a rank.
/// Sums are of integers, so any order gives the same bits; floating-point sums are not offered.
/// After a collective has thrown, the group is not to be used again but for abort().

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

namespace espalier::comm {

class Backend;        // one implementation a file: mpi.cpp, self.cpp
class DeviceBackend;  // nccl.cpp / no_nccl.cpp

class Communicator {
 public:
  /// One rank, nothing initialised: for tests and tools.
  static Communicator self();
  /// MPI_COMM_WORLD (duplicated). Initialises MPI when it is not; MPI errors are returned and
  /// checked, never fatal inside the library. Finalised at exit. Called again, it gives the same
  /// group with the new timeout.
  ///
  /// Where the environment shows no launcher (mpirun, srun with PMI), MPI is not initialised and
  /// this is self(): a program started alone needs no MPI daemon. Throws EnvironmentError when a
  /// launcher started several processes that MPI does not see as one group.
  static Communicator world(double timeout_seconds);
  /// This group with NCCL beside it, for device memory of GPU `device` (one rank a GPU);
  /// collective. Throws EnvironmentError where NCCL is not built, not loadable or finds no such
  /// GPU.
  Communicator with_nccl(int device) const;

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

  /// Called now and then by a rank that works alone while the others already wait for it: their
  /// deadline begins anew (about once a second a message of a few bytes to each; not collective).
  void still_working() const;

  /// Throws UserError on every rank, naming the first rank that differs, unless all ranks hold the
  /// same text (`what` names it: "configuration", "library versions", "data checksum").
  void require_same(const std::string& what, const std::string& text) const;

  /// all_reduce_sum and broadcast of device memory, by NCCL: the work is queued on `stream`
  /// (cudaStream_t) behind what is there already, and has ended when the call returns. DefectError
  /// without with_nccl().
  void all_reduce_sum_device(void* int64_values, int64_t count, void* stream) const;
  void broadcast_device(void* bytes, int64_t count, int root, void* stream) const;

  /// Bytes this rank sent so far in the usual cost models, whatever the library really did. Of n
  /// bytes on p ranks: all_reduce 2(p-1)/p n (ring); broadcast (p-1) n at the root, else 0;
  /// all_gather (p-1) times its own bytes; gather its own bytes, the root 0; barrier 0. Lengths
  /// sent along are not counted.
  int64_t bytes_sent() const;

  /// Prints "espalier: <message>" once and ends every rank within seconds with `exit_code`: called
  /// by the rank on which an error arose, from the thread that calls collectives. Ranks that are
  /// ended so print nothing themselves; when several fail at once, the lowest prints.
  [[noreturn]] void abort(const std::string& message, int exit_code) const;

  explicit Communicator(std::shared_ptr<Backend> backend,
                        std::shared_ptr<DeviceBackend> device = nullptr)
      : backend_(std::move(backend)), device_(std::move(device)) {}

 private:
  std::shared_ptr<Backend> backend_;
  std::shared_ptr<DeviceBackend> device_;
};

/// The NCCL that device collectives would use, such as "2.30.7". Loads it, needs no GPU. Throws
/// EnvironmentError where it is not built or cannot be loaded.
std::string nccl_version();

/// T values as bytes, for broadcast and gather.
template <class T>
std::span<std::byte> bytes_of(std::span<T> values) {
  return {reinterpret_cast<std::byte*>(const_cast<std::remove_const_t<T>*>(values.data())),
          values.size_bytes()};
}

}  // namespace espalier::comm
