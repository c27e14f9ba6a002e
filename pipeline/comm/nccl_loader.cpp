// NCCL lives in a module of its own (nccl.cpp), loaded here when device collectives are asked for,
// so that runs on CPUs neither need nor map it.
#include <dlfcn.h>
#include <fmt/format.h>

#include <climits>
#include <cstdlib>
#include <filesystem>

#include "pipeline/comm/backend.h"
#include "pipeline/comm/communicator.h"
#include "pipeline/comm/nccl_module.h"
#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

/// The module beside the executable (an installation), else where it was built.
void* open_module() {
  std::error_code ignored;
  const auto executable = std::filesystem::read_symlink("/proc/self/exe", ignored);
  const auto beside = executable.parent_path() / "libespalier_nccl.so";
  const std::string path =
      std::filesystem::exists(beside, ignored) ? beside.string() : ESPALIER_NCCL_MODULE;
  if (void* module = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL)) return module;
  throw EnvironmentError(fmt::format(
      "NCCL cannot be loaded: {}; build the target espalier_nccl, or choose cluster.backend=mpi",
      dlerror()));
}

template <class Function>
Function* find(const char* name) {
  static void* module = open_module();
  if (void* symbol = dlsym(module, name)) return reinterpret_cast<Function*>(symbol);
  throw EnvironmentError(fmt::format(
      "the NCCL module has no {}: it is of another build; build the target espalier_nccl again",
      name));
}

}  // namespace

std::shared_ptr<DeviceBackend> nccl_backend(std::shared_ptr<Backend> host, int device) {
  auto* create = find<decltype(espalier_nccl_create)>("espalier_nccl_create");
  return std::shared_ptr<DeviceBackend>(create(std::move(host), device));
}

std::string nccl_version() {
  const int code = find<decltype(espalier_nccl_version)>("espalier_nccl_version")();
  return fmt::format("{}.{}.{}", code / 10000, code / 100 % 100, code % 100);
}

}  // namespace espalier::comm
