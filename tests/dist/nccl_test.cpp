#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <iostream>
#include <numeric>

#include "pipeline/comm/communicator.h"
#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

/// A module that is built but does not load is a failure, not a skip.
constexpr bool kBuilt = ESPALIER_HAS_NCCL;

int gpus_of_this_node() {
  int count = 0;
  while (std::filesystem::exists("/dev/nvidia" + std::to_string(count))) ++count;
  return count;
}

/// The CUDA runtime that the NCCL module has brought into this process.
class Cuda {
 public:
  Cuda() {
    for (const char* name : {"libcudart.so.13", "libcudart.so.12"})
      if (!library_) library_ = dlopen(name, RTLD_NOW | RTLD_NOLOAD);
    if (!library_) throw std::runtime_error("no CUDA runtime is loaded");
  }
  void* allocate(size_t bytes) const {
    void* memory = nullptr;
    expect(call<int(void**, size_t)>("cudaMalloc")(&memory, bytes));
    return memory;
  }
  void copy(void* to, const void* from, size_t bytes) const {
    constexpr int by_address = 4;  // cudaMemcpyDefault
    expect(call<int(void*, const void*, size_t, int)>("cudaMemcpy")(to, from, bytes, by_address));
  }
  void free(void* memory) const { expect(call<int(void*)>("cudaFree")(memory)); }

 private:
  template <class Function>
  Function* call(const char* name) const {
    return reinterpret_cast<Function*>(dlsym(library_, name));
  }
  static void expect(int result) { EXPECT_EQ(result, 0); }
  void* library_ = nullptr;
};

TEST(Nccl, TheLinkedLibraryLoadsOnDemandAndTellsItsVersion) {
  if (!kBuilt) GTEST_SKIP() << "skipped: built without NCCL";
  const std::string version = nccl_version();
  RecordProperty("nccl", version);
  EXPECT_GE(std::stoi(version), 2) << version;
  if (Communicator::world(120).is_root()) std::cout << "NCCL " << version << std::endl;
}

TEST(Nccl, AGpuThatIsNotThereIsAnErrorThatSaysSo) {
  if (!kBuilt) GTEST_SKIP() << "skipped: built without NCCL";
  try {
    Communicator::self().with_nccl(gpus_of_this_node() + 7);
    FAIL() << "no error";
  } catch (const EnvironmentError& error) {
    EXPECT_NE(std::string(error.what()).find("asks for GPU"), std::string::npos) << error.what();
  }
}

TEST(Nccl, SumsAndBroadcastsOfDeviceMemoryEqualThoseOfTheHost) {
  const auto host = Communicator::world(120);
  const char* local = std::getenv("OMPI_COMM_WORLD_LOCAL_RANK");
  const int device = local ? std::atoi(local) : 0;
  int64_t missing = gpus_of_this_node() <= device;
  host.all_reduce_max(std::span<int64_t>(&missing, 1));
  if (missing) GTEST_SKIP() << "skipped: no GPU" << (gpus_of_this_node() ? " for every rank" : "");
  const auto group = host.with_nccl(device);
  EXPECT_EQ(group.backend(), "nccl");

  constexpr int64_t size = 1'000'003;
  const size_t bytes = size * sizeof(int64_t);
  std::vector<int64_t> expected(size), got(size);
  for (int64_t i = 0; i < size; ++i) expected[i] = (i - size / 2) * (1 + group.rank());
  const Cuda cuda;
  void* memory = cuda.allocate(bytes);
  cuda.copy(memory, expected.data(), bytes);
  group.all_reduce_sum_device(memory, size, nullptr);
  cuda.copy(got.data(), memory, bytes);
  host.all_reduce_sum(expected);
  EXPECT_TRUE(got == expected);

  const int root = group.size() - 1;
  if (group.rank() == root) std::iota(expected.begin(), expected.end(), 5);
  if (group.rank() == root) cuda.copy(memory, expected.data(), bytes);
  group.broadcast_device(memory, static_cast<int64_t>(bytes), root, nullptr);
  cuda.copy(got.data(), memory, bytes);
  host.broadcast(bytes_of(std::span<int64_t>(expected)), root);
  EXPECT_TRUE(got == expected);
  cuda.free(memory);
}

}  // namespace
}  // namespace espalier::comm
