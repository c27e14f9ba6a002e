#include "stages/compress/model_shards.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/errors.h"
#include "pipeline/io/safetensors.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kShardBytes = int64_t{1} << 30;

int64_t bytes_of(const io::TensorPlan& plan) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(plan.dtype));
  for (int64_t size : plan.shape) bytes *= size;
  return bytes;
}

}  // namespace

void write_changed_model(const io::Checkpoint& base, const std::vector<io::TensorPlan>& plan,
                         const std::function<at::Tensor(size_t index)>& tensor,
                         const model::ClassNames& labels, const fs::path& directory) {
  std::error_code error;
  fs::remove_all(directory, error);
  if (error)
    throw EnvironmentError(
        fmt::format("{}: cannot be removed: {}", directory.string(), error.message()));
  for (size_t begin = 0, shard = 1; begin < plan.size(); ++shard) {
    size_t end = begin;
    for (int64_t bytes = 0; end < plan.size(); ++end) {
      bytes += bytes_of(plan[end]);
      if (end > begin && bytes > kShardBytes) break;
    }
    io::SafetensorsWriter writer(directory / fmt::format("changed-{:05}.safetensors", shard),
                                 {plan.begin() + begin, plan.begin() + end});
    for (; begin < end; ++begin) writer.append(tensor(begin));
    writer.commit();
  }
  if (labels) model::write_label_names(directory, *labels);
  io::write_derived(directory, base);
}

}  // namespace espalier::compress
