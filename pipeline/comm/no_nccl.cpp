// Built where no NCCL was found at configure time; nccl_loader.cpp stands in its place elsewhere.
#include "pipeline/comm/backend.h"
#include "pipeline/comm/communicator.h"
#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

constexpr const char* kMissing =
    "this espalier was built without NCCL; configure it again with ESPALIER_NCCL and ESPALIER_CUDA "
    "naming the folders that hold include/nccl.h and include/cuda_runtime_api.h, or choose "
    "cluster.backend=mpi";

}  // namespace

std::shared_ptr<DeviceBackend> nccl_backend(std::shared_ptr<Backend>, int) {
  throw EnvironmentError(kMissing);
}

std::string nccl_version() { throw EnvironmentError(kMissing); }

}  // namespace espalier::comm
