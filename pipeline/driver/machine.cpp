#include "pipeline/driver/machine.h"

#include <fmt/format.h>
#include <sched.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <thread>

#include "pipeline/linalg/product.h"

namespace espalier::driver {
namespace {

/// The value behind `key :` of the first such line of a /proc file.
std::string proc_value(const char* file, const std::string& key) {
  std::ifstream in(file);
  for (std::string line; std::getline(in, line);)
    if (line.starts_with(key)) {
      const size_t colon = line.find(':');
      const size_t begin = line.find_first_not_of(" \t", colon + 1);
      return begin == std::string::npos ? "" : line.substr(begin);
    }
  return "";
}

int ranks_on_this_host() {
  for (const char* name :
       {"OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "SLURM_NTASKS_PER_NODE"})
    if (const char* value = std::getenv(name)) return std::max(1, std::atoi(value));
  return 1;
}

}  // namespace

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int all = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const int mine = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : all;
  // An affinity of every online core means that nothing bound this rank: it shares them.
  const bool bound = mine < static_cast<int>(sysconf(_SC_NPROCESSORS_ONLN));
  return bound ? mine : std::max(1, mine / ranks_on_this_host());
}

int64_t peak_resident_bytes() {
  return std::atoll(proc_value("/proc/self/status", "VmHWM").c_str()) * 1024;
}

void reset_peak_resident() { std::ofstream("/proc/self/clear_refs") << "5"; }

nlohmann::json describe_machine() {
  char host[256] = {};
  gethostname(host, sizeof host - 1);
  return {{"espalier", ESPALIER_VERSION},
          {"host", host},
          {"processor", proc_value("/proc/cpuinfo", "model name")},
          {"products", linalg::product_description()},
          {"libtorch", TORCH_VERSION}};
}

std::string library_versions() {
  return fmt::format("espalier {}, LibTorch {}, {}, {}", ESPALIER_VERSION, TORCH_VERSION,
                     linalg::product_description(), proc_value("/proc/cpuinfo", "model name"));
}

}  // namespace espalier::driver
