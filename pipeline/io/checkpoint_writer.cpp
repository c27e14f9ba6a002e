#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/checkpoint_layout.h"

namespace espalier::io {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

struct Shard {
  std::vector<TensorPlan> tensors;
  int64_t bytes = 0;
};

int64_t bytes_of(const TensorPlan& tensor) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(tensor.dtype));
  for (const int64_t size : tensor.shape) bytes *= size;
  return bytes;
}

/// Tensors by name into shards, each full before the next; a tensor above the limit stands alone.
std::vector<Shard> plan_shards(const Checkpoint& model, at::ScalarType dtype, int64_t shard_bytes) {
  std::vector<Shard> shards(1);
  for (const std::string& name : model.names()) {
    const TensorInfo& info = model.info(name);
    TensorPlan tensor{name, at::isFloatingType(info.dtype) ? dtype : info.dtype, info.shape};
    const int64_t bytes = bytes_of(tensor);
    if (!shards.back().tensors.empty() && shards.back().bytes + bytes > shard_bytes) {
      shards.emplace_back();
    }
    shards.back().bytes += bytes;
    shards.back().tensors.push_back(std::move(tensor));
  }
  for (Shard& shard : shards) {  // wide elements first: then every tensor is aligned to its element
    std::stable_sort(shard.tensors.begin(), shard.tensors.end(), [](const auto& a, const auto& b) {
      return c10::elementSize(a.dtype) > c10::elementSize(b.dtype);
    });
  }
  return shards;
}

void refuse_overwriting_sources(const Checkpoint& model, const fs::path& directory) {
  for (const fs::path& source : model.chain()) {
    std::error_code error;
    if (fs::equivalent(source, directory, error)) {
      throw UserError(
          fmt::format("{}: the export would overwrite the model that it is made from; choose "
                      "another export.directory",
                      directory.string()));
    }
  }
}

/// What an earlier export left and this one does not replace. The index goes first: without it the
/// directory is no model until this export is complete.
void remove_stale(const fs::path& directory, const std::set<std::string>& written) {
  std::vector<std::string> stale{kIndexFile, kDerivedFile};
  for (const std::string& name : safetensors_files(directory)) {
    const bool ours = name == kWeightsFile || is_shard_name(name);
    if (ours && written.count(name) == 0) stale.push_back(name);
  }
  for (const std::string& name : stale) {
    std::error_code error;
    fs::remove(directory / name, error);
    if (error) throw_environment_error(directory / name, "cannot be removed", error.value());
  }
}

void write_one_shard(const Checkpoint& model, const fs::path& file, const Shard& shard) {
  SafetensorsWriter writer(file, shard.tensors, {{"format", "pt"}});
  for (const TensorPlan& tensor : shard.tensors) {
    writer.append(model.view(tensor.name).to(tensor.dtype));
    model.drop(tensor.name);
  }
  writer.commit();
}

void write_index(const fs::path& directory, const std::vector<Shard>& shards) {
  json map = json::object();
  int64_t total = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    total += shards[i].bytes;
    for (const TensorPlan& tensor : shards[i].tensors)
      map[tensor.name] = shard_name(i, shards.size());
  }
  const json index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
  write_file(directory / kIndexFile, index.dump(2) + "\n");
}

std::string dtype_of_config(at::ScalarType dtype) {
  if (dtype == at::kFloat) return "float32";
  if (dtype == at::kBFloat16) return "bfloat16";
  if (dtype == at::kHalf) return "float16";
  if (dtype == at::kDouble) return "float64";
  throw DefectError(fmt::format("a model cannot be written in {}", c10::toString(dtype)));
}

void write_config(const Checkpoint& model, const fs::path& directory, at::ScalarType dtype) {
  json config = model.config();
  const std::string name = dtype_of_config(dtype);
  // transformers 5 reads and writes "dtype", older versions "torch_dtype".
  if (config.contains("torch_dtype")) config["torch_dtype"] = name;
  if (config.contains("dtype") || !config.contains("torch_dtype")) config["dtype"] = name;
  write_file(directory / kConfigFile, config.dump(2) + "\n");
}

/// How the base is named from `directory` (see checkpoint.h).
std::string base_path(const fs::path& directory, const fs::path& base) {
  const fs::path from = fs::canonical(directory), to = fs::canonical(base);
  const fs::path relative = to.lexically_relative(from);
  const auto ups = std::count(relative.begin(), relative.end(), fs::path(".."));
  return ups <= 2 ? relative.string() : to.string();
}

}  // namespace

void write_derived(const std::filesystem::path& directory, const Checkpoint& base) {
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) throw_environment_error(directory, "the directory cannot be created", error.value());
  const json content = {{"base", base_path(directory, base.directory())},
                        {"base_checksum", base.tensors_checksum()},
                        {"base_fingerprint", base.fingerprint()}};
  write_file(directory / kDerivedFile, content.dump(2) + "\n");
}

struct DenseExport::Plan {
  Checkpoint model;
  fs::path directory;
  at::ScalarType dtype;
  std::vector<Shard> shards;

  bool has_config() const { return fs::exists(model.root() / kConfigFile); }
};

DenseExport::DenseExport(const Checkpoint& model, const std::filesystem::path& directory,
                         at::ScalarType dtype, int64_t shard_bytes) {
  refuse_overwriting_sources(model, directory);
  plan_ = std::make_shared<const Plan>(
      Plan{model, directory, dtype, plan_shards(model, dtype, shard_bytes)});
}

void DenseExport::begin() const {
  int64_t total = 0;
  for (const Shard& shard : plan_->shards) total += shard.bytes;
  const fs::path& directory = plan_->directory;
  require_space(directory, total);
  std::error_code error;
  fs::create_directories(directory, error);
  if (error) throw_environment_error(directory, "the directory cannot be created", error.value());
  const std::vector<std::string> names = files();
  remove_stale(directory, {names.begin(), names.end()});
  for (const std::string& name : companion_files(plan_->model.root())) {
    copy_whole(plan_->model.root() / name, directory / name);
  }
  if (plan_->has_config()) write_config(plan_->model, directory, plan_->dtype);
}

int64_t DenseExport::shards() const { return static_cast<int64_t>(plan_->shards.size()); }

void DenseExport::write_shard(int64_t shard) const {
  write_one_shard(plan_->model, plan_->directory / shard_name(shard, plan_->shards.size()),
                  plan_->shards.at(shard));
}

void DenseExport::finish() const {
  if (plan_->shards.size() > 1) write_index(plan_->directory, plan_->shards);
}

std::vector<std::string> DenseExport::files() const {
  std::vector<std::string> names = companion_files(plan_->model.root());
  if (plan_->has_config()) names.push_back(kConfigFile);
  for (size_t i = 0; i < plan_->shards.size(); ++i) {
    names.push_back(shard_name(i, plan_->shards.size()));
  }
  if (plan_->shards.size() > 1) names.push_back(kIndexFile);
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> write_dense(const Checkpoint& model,
                                     const std::filesystem::path& directory, at::ScalarType dtype,
                                     int64_t shard_bytes) {
  const DenseExport dense(model, directory, dtype, shard_bytes);
  dense.begin();
  for (int64_t shard = 0; shard < dense.shards(); ++shard) dense.write_shard(shard);
  dense.finish();
  return dense.files();
}

}  // namespace espalier::io
