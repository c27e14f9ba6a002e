// Collectives of device memory by NCCL. Calls are nonblocking and polled, so that a peer that never
// comes ends in a message, not in a hang; an error aborts the NCCL communicator.
#include <cuda_runtime_api.h>
#include <fmt/format.h>
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "pipeline/comm/backend.h"
#include "pipeline/comm/nccl_module.h"
#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

using Clock = std::chrono::steady_clock;
using namespace std::chrono_literals;

constexpr auto kSpin = 100us;
constexpr auto kSleep = 50us;
constexpr int64_t kPiece = int64_t{1} << 30;

void check_cuda(cudaError_t result, const char* call) {
  if (result == cudaSuccess) return;
  throw EnvironmentError(fmt::format("{} failed: {}", call, cudaGetErrorString(result)));
}

class NcclBackend final : public DeviceBackend {
 public:
  NcclBackend(std::shared_ptr<Backend> host, int device) : host_(std::move(host)) {
    int devices = 0;
    check_cuda(cudaGetDeviceCount(&devices), "cudaGetDeviceCount");
    if (device < 0 || device >= devices)
      throw EnvironmentError(
          fmt::format("rank {} asks for GPU {} of {} on its node", host_->rank(), device, devices));
    check_cuda(cudaSetDevice(device), "cudaSetDevice");
    check_cuda(cudaEventCreateWithFlags(&done_, cudaEventDisableTiming),
               "cudaEventCreateWithFlags");
    ncclUniqueId id{};
    if (host_->rank() == 0) check(ncclGetUniqueId(&id), "ncclGetUniqueId");
    host_->broadcast(std::as_writable_bytes(std::span(&id, 1)), 0);
    ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
    config.blocking = 0;
    try {
      check(ncclCommInitRankConfig(&comm_, host_->size(), id, host_->rank(), &config),
            "ncclCommInitRankConfig");
      wait("the start of NCCL", [] { return true; });
    } catch (...) {
      release();
      throw;
    }
  }
  ~NcclBackend() override { release(); }
  NcclBackend(const NcclBackend&) = delete;
  NcclBackend& operator=(const NcclBackend&) = delete;

  std::string name() const override { return "nccl"; }
  int64_t bytes_sent() const override { return sent_; }

  void all_reduce_sum(void* int64_values, int64_t count, void* stream) override {
    auto* values = static_cast<int64_t*>(int64_values);
    const auto queue = static_cast<cudaStream_t>(stream);
    for (int64_t at = 0; at < count; at += kPiece)
      check(ncclAllReduce(values + at, values + at, std::min(kPiece, count - at), ncclInt64,
                          ncclSum, comm_, queue),
            "ncclAllReduce");
    finish("all_reduce_sum_device", queue);
    sent_ +=
        2 * count * static_cast<int64_t>(sizeof(int64_t)) * (host_->size() - 1) / host_->size();
  }

  void broadcast(void* bytes, int64_t count, int root, void* stream) override {
    auto* values = static_cast<std::byte*>(bytes);
    const auto queue = static_cast<cudaStream_t>(stream);
    for (int64_t at = 0; at < count; at += kPiece)
      check(ncclBroadcast(values + at, values + at, std::min(kPiece, count - at), ncclUint8, root,
                          comm_, queue),
            "ncclBroadcast");
    finish("broadcast_device", queue);
    if (host_->rank() == root) sent_ += (host_->size() - 1) * count;
  }

 private:
  /// Throws on an error; a call that is still in progress is waited for before the next one.
  void check(ncclResult_t result, const char* call) {
    if (result == ncclInProgress) return wait(call, [] { return true; });
    if (result != ncclSuccess)
      throw EnvironmentError(fmt::format("{} failed on rank {}: {} ({})", call, host_->rank(),
                                         ncclGetErrorString(result), ncclGetLastError(nullptr)));
  }

  void finish(const char* operation, cudaStream_t stream) {
    check_cuda(cudaEventRecord(done_, stream), "cudaEventRecord");
    wait(operation, [&] {
      const cudaError_t state = cudaEventQuery(done_);
      if (state != cudaErrorNotReady) check_cuda(state, operation);
      return state == cudaSuccess;
    });
  }

  /// Polls until NCCL has nothing in progress and ready() says true.
  template <class Ready>
  void wait(const char* operation, const Ready& ready) {
    const auto start = Clock::now();
    for (;;) {
      ncclResult_t state = ncclSuccess;
      const ncclResult_t asked = ncclCommGetAsyncError(comm_, &state);
      if (asked != ncclSuccess) state = asked;
      if (state != ncclSuccess && state != ncclInProgress) {
        const std::string reason = ncclGetErrorString(state);
        release();
        throw EnvironmentError(
            fmt::format("{} failed on rank {}: {}", operation, host_->rank(), reason));
      }
      if (state == ncclSuccess && ready()) return;
      const auto waited = std::chrono::duration<double>(Clock::now() - start).count();
      if (waited > host_->timeout_seconds()) {
        release();
        throw EnvironmentError(fmt::format(
            "{}: rank {} of {} waited {:.1f} seconds for its peers' GPUs; look at their nodes, or "
            "raise cluster.timeout_seconds",
            operation, host_->rank(), host_->size(), waited));
      }
      if (waited < std::chrono::duration<double>(kSpin).count()) continue;
      host_->check_peers();
      std::this_thread::sleep_for(kSleep);
    }
  }

  /// Abort, not destroy: it waits for no peer. Nothing is outstanding when all went well.
  void release() {
    if (comm_) ncclCommAbort(comm_);
    comm_ = nullptr;
    if (done_) cudaEventDestroy(done_);
    done_ = nullptr;
  }

  std::shared_ptr<Backend> host_;
  ncclComm_t comm_ = nullptr;
  cudaEvent_t done_ = nullptr;
  int64_t sent_ = 0;
};

}  // namespace
}  // namespace espalier::comm

extern "C" espalier::comm::DeviceBackend* espalier_nccl_create(
    std::shared_ptr<espalier::comm::Backend> host, int device) {
  return new espalier::comm::NcclBackend(std::move(host), device);
}

extern "C" int espalier_nccl_version() {
  int code = 0;
  ncclGetVersion(&code);
  return code;
}
