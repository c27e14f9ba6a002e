#include "stages/compress/decode.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;

at::ScalarType decoded_type(const Residual& residual, at::ScalarType stored) {
  return at::isFloatingType(stored) ? residual.dtype : stored;
}

/// Removes the directory when the decoding ends, however it ends.
class Scratch {
 public:
  explicit Scratch(fs::path directory) : directory_(std::move(directory)) { remove(); }
  ~Scratch() { remove(); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  const fs::path& directory() const { return directory_; }

 private:
  void remove() {
    std::error_code ignored;
    fs::remove_all(directory_, ignored);
  }
  fs::path directory_;
};

std::vector<io::TensorPlan> plan_of(const Residual& residual) {
  std::vector<io::TensorPlan> plan;
  for (const auto& matrix : residual.matrices)
    plan.push_back({matrix.name, residual.dtype, matrix.shape});
  for (const auto& [name, tensor] : residual.whole)
    plan.push_back({name, decoded_type(residual, tensor.scalar_type()), tensor.sizes().vec()});
  return plan;
}

}  // namespace

void require_base(const io::Checkpoint& base, const Residual& residual, const fs::path& file) {
  if (base.tensors_checksum() != residual.base_checksum)
    throw UserError(fmt::format(
        "{}: was taken against the model with checksum {}, but {} has {}; give the base that the "
        "residual was written for",
        file.string(), residual.base_checksum, base.directory().string(), base.tensors_checksum()));
  for (const auto& matrix : residual.matrices) {
    if (!base.has(matrix.name))
      throw UserError(fmt::format("{}: {} is not in the base {}", file.string(), matrix.name,
                                  base.directory().string()));
    if (base.info(matrix.name).shape != matrix.shape)
      throw UserError(fmt::format("{}: {} is [{}] and [{}] in the base {}", file.string(),
                                  matrix.name, fmt::join(matrix.shape, ", "),
                                  fmt::join(base.info(matrix.name).shape, ", "),
                                  base.directory().string()));
  }
}

void for_each_decoded(const io::Checkpoint& base, const Residual& residual,
                      const std::function<void(const std::string&, const at::Tensor&)>& use) {
  for (const auto& matrix : residual.matrices) {
    use(matrix.name,
        decode_matrix(matrix.encoded, base.view(matrix.name), residual.polar, residual.dtype));
    base.drop(matrix.name);
  }
  for (const auto& [name, tensor] : residual.whole)
    use(name, tensor.to(decoded_type(residual, tensor.scalar_type())).contiguous());
}

void decode_residual(const fs::path& base_directory, const fs::path& residual_file,
                     const fs::path& out_directory) {
  const Residual residual = read_residual(residual_file);
  const io::Checkpoint base = io::Checkpoint::open(base_directory);
  require_base(base, residual, residual_file);
  const Scratch scratch(out_directory / ".decoding");
  const std::vector<io::TensorPlan> plan = plan_of(residual);
  if (!plan.empty()) {
    io::SafetensorsWriter writer(scratch.directory() / "changed.safetensors", plan);
    for_each_decoded(base, residual,
                     [&](const std::string&, const at::Tensor& tensor) { writer.append(tensor); });
    writer.commit();
  }
  io::write_derived(scratch.directory(), base);
  io::write_dense(io::Checkpoint::open(scratch.directory()), out_directory, residual.dtype);
}

}  // namespace espalier::compress
