#pragma once
/// What a collective library has to offer; Communicator builds everything else from it.
///
/// One implementation a file: self.cpp (one rank, nothing initialised), mpi.cpp (host memory) and,
/// for device memory beside one of those, nccl.cpp. Counts are 64-bit: implementations split what
/// their library cannot take in one piece. Errors are EnvironmentError naming the operation.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

namespace espalier::comm {

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string name() const = 0;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual double timeout_seconds() const = 0;

  virtual void all_reduce_sum(std::span<int64_t> values) = 0;
  virtual void all_reduce_max(std::span<int64_t> values) = 0;
  virtual void all_reduce_max(std::span<double> values) = 0;
  virtual void broadcast(std::span<std::byte> bytes, int root) = 0;
  virtual std::vector<std::vector<std::byte>> all_gather(std::span<const std::byte> mine) = 0;
  virtual std::vector<std::vector<std::byte>> gather(std::span<const std::byte> mine, int root) = 0;
  virtual void barrier() = 0;
  virtual void still_working() = 0;
  virtual int64_t bytes_sent() const = 0;
  [[noreturn]] virtual void abort(const std::string& message, int exit_code) = 0;

  /// Called by every loop that waits for something else than this backend's own messages (a GPU):
  /// ends this process quietly when another rank has announced an error.
  virtual void check_peers() = 0;
};

/// Collectives of device memory, beside a host backend that bootstraps them.
class DeviceBackend {
 public:
  virtual ~DeviceBackend() = default;
  virtual std::string name() const = 0;
  virtual void all_reduce_sum(void* int64_values, int64_t count, void* stream) = 0;
  virtual void broadcast(void* bytes, int64_t count, int root, void* stream) = 0;
  virtual int64_t bytes_sent() const = 0;
};

/// "espalier: <message>" on standard error in one write, after everything printed before.
void print_error(const std::string& message);
/// Flushes the standard streams and ends the process without handlers that could wait for peers.
[[noreturn]] void exit_now(int exit_code);

std::shared_ptr<Backend> self_backend();
/// The MPI backend over MPI_COMM_WORLD; MPI is initialised when it is not. The same object at every
/// call, with the timeout of the latest.
std::shared_ptr<Backend> mpi_backend(double timeout_seconds);
/// NCCL on GPU `device`, bootstrapped by `host`. Throws EnvironmentError where it is not built
/// (no_nccl.cpp) or cannot be loaded.
std::shared_ptr<DeviceBackend> nccl_backend(std::shared_ptr<Backend> host, int device);

}  // namespace espalier::comm
