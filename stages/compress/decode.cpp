#include "stages/compress/decode.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/model/config_keys.h"
#include "pipeline/model/heads.h"
#include "stages/compress/sum.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;

at::Tensor as_type(const at::Tensor& tensor, at::ScalarType floating) {
  return tensor.to(at::isFloatingType(tensor.scalar_type()) ? floating : tensor.scalar_type())
      .contiguous();
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
  for (const auto& [name, rows] : residual.added) {
    const std::vector<int64_t> ours = base.has(name) ? base.info(name).shape : rows.sizes().vec();
    if (!base.has(name) || ours.size() != static_cast<size_t>(rows.dim()) ||
        !std::equal(ours.begin() + 1, ours.end(), rows.sizes().begin() + 1))
      throw UserError(
          fmt::format("{}: rows are added to {}, which the base {} does not have in "
                      "their shape",
                      file.string(), name, base.directory().string()));
  }
}

Decoder::Decoder(const io::Checkpoint& base, const Residual& residual)
    : base_(base), residual_(residual) {
  std::map<std::string, std::vector<int64_t>> shapes;  // of what is decoded
  for (size_t i = 0; i < residual.matrices.size(); ++i) {
    matrices_[residual.matrices[i].name] = i;
    shapes[residual.matrices[i].name] = residual.matrices[i].shape;
  }
  for (size_t i = 0; i < residual.added.size(); ++i) {
    const auto& [name, rows] = residual.added[i];
    added_[name] = i;
    shapes[name] = base.info(name).shape;
    shapes[name][0] += rows.size(0);
  }
  for (const auto& [name, shape] : shapes) plan_.push_back({name, residual.dtype, shape});
  for (size_t i = 0; i < residual.whole.size(); ++i) {
    const auto& [name, tensor] = residual.whole[i];
    whole_[name] = i;
    const bool floating = at::isFloatingType(tensor.scalar_type());
    plan_.push_back({name, floating ? residual.dtype : tensor.scalar_type(), tensor.sizes().vec()});
    shapes[name] = tensor.sizes().vec();
  }
  for (const auto& [name, to] : residual.tied) {
    if (shapes.count(to) == 0 && !base.has(to))
      throw UserError(fmt::format(
          "{}: is said to be tied to {}, which is neither in the residual nor in the base {}", name,
          to, base.directory().string()));
    plan_.push_back({name, residual.dtype, shapes.count(to) ? shapes[to] : base.info(to).shape});
  }
}

at::Tensor Decoder::decode_rows(const std::string& name, at::ScalarType floating) const {
  const auto matrix = matrices_.find(name);
  const at::Tensor base = base_.view(name);
  const at::Tensor rows = matrix == matrices_.end()
                              ? as_type(base, floating)
                              : decode_matrix(residual_.matrices[matrix->second].encoded, base,
                                              residual_.polar, floating);
  const auto more = added_.find(name);
  if (more == added_.end()) return rows;
  return at::cat({rows, residual_.added[more->second].tensor.to(floating)}).contiguous();
}

at::Tensor Decoder::decode_named(const std::string& name, at::ScalarType floating) const {
  const auto whole = whole_.find(name);
  if (whole != whole_.end()) return as_type(residual_.whole[whole->second].tensor, floating);
  const at::Tensor decoded = decode_rows(name, floating);
  base_.drop(name);
  return decoded;
}

at::Tensor Decoder::decode(size_t i, at::ScalarType floating) const {
  const std::string& name = plan_[i].name;
  for (const auto& tied : residual_.tied)
    if (tied.name == name) return decode_named(tied.to, floating);
  return decode_named(name, floating);
}

void decode_residuals(const fs::path& base_directory, const std::vector<fs::path>& residual_files,
                      const fs::path& out_directory) {
  const io::Checkpoint base = io::Checkpoint::open(base_directory);
  io::require_overwritable(base, out_directory);
  const Scratch scratch(out_directory / ".decoding");
  const at::ScalarType dtype = write_sum(base, {residual_files, {}}, scratch.directory());
  const io::Checkpoint decoded = io::Checkpoint::open(scratch.directory());
  const nlohmann::json config_keys = model::config_of_tensors(decoded);
  io::write_dense(decoded, out_directory, dtype);
  model::set_config_keys(out_directory, config_keys);
  // Heads that are gone stay gone; the directory is then one for espalier, whose export makes it
  // one for other programs.
  if (const auto heads = io::nearest_file(base.chain(), model::kHeadsFile))
    io::write_file(out_directory / model::kHeadsFile, io::read_file(*heads));
}

}  // namespace espalier::compress
