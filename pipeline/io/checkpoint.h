#pragma once
/// A model on disk: a directory as `transformers` writes it, or an espalier model directory that
/// stores only what a stage changed and names the model it stands on.
///
/// Also any other tensors by name, without an architecture: a single *.safetensors file, a
/// directory of such files, what the diffusers library writes (diffusion_pytorch_model.*), and a
/// directory of parts (model_index.json, or no weights of its own): the tensors of unet/,
/// text_encoder/ ... are "unet/NAME".
///
/// A tensor that a file holds packed (packed_tensor.h) is here the dense one: info, view, bytes and
/// checksums are those of the same model written dense.
///
/// A derived directory holds `derived.json` ({"base": DIR, "base_checksum": ...,
/// "base_fingerprint":
/// ...}) and any number of safetensors files; a tensor found in the directory hides the base's.
/// Chains of up to 64 directories. "base" is relative to the derived directory when the base lies
/// in the same run directory (below the parent of the stage's directory), so that a run can be
/// moved; else it is absolute.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/io/packed_tensor.h"
#include "pipeline/io/safetensors.h"

namespace espalier::io {

class Checkpoint {
 public:
  /// Opens and checks headers of all files (model.safetensors, or model.safetensors.index.json with
  /// its shards; else whatever stands above; derived directories recursively, each base held
  /// against the fingerprint in derived.json). Throws UserError naming directory and file.
  static Checkpoint open(const std::filesystem::path& directory);

  const std::filesystem::path& directory() const;
  /// The directory at the bottom of the chain: config.json, tokenizer files.
  const std::filesystem::path& root() const;
  /// This directory and those it stands on, down to the root.
  std::vector<std::filesystem::path> chain() const;
  /// Of a directory of parts each folder and the stem of its weights' name ("unet":
  /// "diffusion_pytorch_model"); else empty.
  const std::map<std::string, std::string>& parts() const;
  /// config.json, parsed (bounded size and depth). Throws UserError when the root has none.
  const nlohmann::json& config() const;
  std::vector<std::string> names() const;  ///< sorted
  bool has(const std::string& name) const;
  const TensorInfo& info(const std::string& name) const;
  /// Mapped pages. A packed tensor is unpacked by every call, into memory of its own that goes with
  /// the last reference: nothing is cached. Throws UserError naming file and tensor when what is
  /// packed there is damaged.
  at::Tensor view(const std::string& name) const;
  /// Gives the mapped pages back, of a packed tensor those of its parts.
  void drop(const std::string& name) const;
  /// How the tensor is packed; null when it is stored as it is.
  const Packing* packing(const std::string& name) const;
  /// Of all tensors' bytes, by sorted name (dtype, shape, data): equal for a derived model and its
  /// dense export. Cached in the process by tensor; costs one read of the model the first time.
  std::string tensors_checksum() const;
  /// Of one tensor's bytes: what tensors_checksum() is made of. Cached in the process.
  std::string tensor_checksum(const std::string& name) const;
  /// Another process has computed it: this one does not read the tensor for tensors_checksum().
  void learn_tensor_checksum(const std::string& name, const std::string& checksum) const;
  /// Of all tensors' names, dtypes, shapes and a few of their bytes (first, middle, last): costs
  /// some pages a tensor, and all bits of bitmasks. Tells another model and a replaced one, not a
  /// single altered value.
  std::string fingerprint() const;
  /// For a derived model: throws UserError when the base's tensors_checksum is not the one it was
  /// derived from. Costs one read of the base.
  void verify_base() const;
  /// Total bytes of the tensors.
  int64_t bytes() const;
  /// The same model less the tensors whose name `left_out` accepts.
  Checkpoint without(const std::function<bool(const std::string&)>& left_out) const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

/// Writes `derived.json` into `directory` (after the tensor files are complete).
void write_derived(const std::filesystem::path& directory, const Checkpoint& base);
/// Lets the derived.json of `directory` name the same base in another place.
void rebase_derived(const std::filesystem::path& directory, const std::filesystem::path& base);

/// Throws UserError naming directory and file when writing the model whole into `directory` would
/// touch a model that is no ModelExport's: weights without the mark in their metadata, a derived
/// model. Reads the headers there.
void require_overwritable(const Checkpoint& model, const std::filesystem::path& directory);

constexpr int64_t kShardBytes = int64_t{5} << 30;

/// A model written whole: shards of at most `shard_bytes` with the index when more than one,
/// config.json (dtype field set to the tensors'), tokenizer and generation files carried along.
/// Each tensor is cast to `dtype` when floating point. Tied tensors that the root stores once are
/// stored once. A model of parts is written as parts, each with its companions. The metadata of
/// each file of weights say {"written_by": "espalier"}. Atomic by file; streams a tensor at a time.
/// In parts, so that several processes can share the shards: begin() by one of them, then every
/// shard by any, then finish() by one.
///
/// Packed, a shard holds the tensors that it would hold dense and reads each twice: its size is
/// known only then. The files are named packed_model.safetensors, packed_model-00001-of-... and so
/// on, so that a program which does not know the layout finds no weights rather than wrong ones;
/// the index speaks of the dense tensors, not of their parts.
class ModelExport {
 public:
  /// Throws UserError when `directory` is one that the model itself stands on.
  ModelExport(const Checkpoint& model, const std::filesystem::path& directory, at::ScalarType dtype,
              int64_t shard_bytes = kShardBytes, PackFormat format = PackFormat::dense);

  const std::filesystem::path& directory() const;

  /// Removes what an earlier export left and this one does not replace, then writes all that is no
  /// weight. Until finish() a directory of several shards is no complete model.
  void begin() const;
  int64_t shards() const;
  void write_shard(int64_t shard) const;
  void finish() const;
  /// Names of all files that the export consists of, sorted.
  std::vector<std::string> files() const;

 private:
  struct Plan;
  std::shared_ptr<const Plan> plan_;
};

/// All of a dense ModelExport by this process. Returns the names of the files.
std::vector<std::string> write_dense(const Checkpoint& model,
                                     const std::filesystem::path& directory, at::ScalarType dtype,
                                     int64_t shard_bytes = kShardBytes);

}  // namespace espalier::io
