#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <set>
#include <utility>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/json.h"
#include "pipeline/io/packed_header.h"

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

/// A model or one part of it: the tensors whose names begin with `prefix`, written without it.
struct Part {
  std::string prefix, stem;
  std::vector<Shard> shards;

  std::string file(size_t shard) const { return shard_name(shard, shards.size(), stem); }
  std::string index() const { return stem + ".safetensors.index.json"; }
};

/// The stem of the files, whatever the model's own are.
std::string stem_for(std::string stem, PackFormat format) {
  const std::string prefix = kPackedPrefix;
  if (stem.starts_with(prefix)) stem.erase(0, prefix.size());
  return format == PackFormat::dense ? stem : prefix + stem;
}

/// Tensors by name into shards, each full before the next; a tensor above the limit stands alone.
std::vector<Shard> plan_shards(const Checkpoint& model, const std::string& prefix,
                               at::ScalarType dtype, int64_t shard_bytes) {
  std::vector<Shard> shards(1);
  for (const std::string& name : model.names()) {
    if (!name.starts_with(prefix)) continue;
    const TensorInfo& info = model.info(name);
    TensorPlan tensor{name.substr(prefix.size()),
                      at::isFloatingType(info.dtype) ? dtype : info.dtype, info.shape};
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

/// A damaged file does not say it.
bool is_marked(const fs::path& file) {
  try {
    const SafetensorsFile opened(file);
    const auto writer = opened.metadata().find(kWriterKey);
    return writer != opened.metadata().end() && writer->second == kWriter;
  } catch (const UserError&) {
    return false;
  }
}

/// The name of a file there that says that a model of somebody else's lies in the directory; empty:
/// none.
std::string foreign_file(const fs::path& directory) {
  if (!fs::is_directory(directory)) return "";
  for (const char* name : {kDerivedFile, "pytorch_model.bin", "pytorch_model.bin.index.json",
                           "diffusion_pytorch_model.bin", "diffusion_pytorch_model.bin.index.json"})
    if (fs::exists(directory / name)) return name;
  for (const std::string& name : safetensors_files(directory))
    if (!is_marked(directory / name)) return name;
  return "";
}

/// What an earlier export left and this one does not replace. The index goes first: without it the
/// directory is no model until this export is complete.
void remove_stale(const fs::path& directory, const std::set<std::string>& written) {
  std::vector<std::string> stale{kDerivedFile};
  for (const char* stem : kStems) stale.push_back(std::string(stem) + ".safetensors.index.json");
  for (const std::string& name : safetensors_files(directory)) {
    const bool ours = is_weights_name(name);
    if (ours && written.count(name) == 0) stale.push_back(name);
  }
  for (const auto& entry : fs::directory_iterator(directory))  // of an export that was killed
    if (is_temporary(entry.path())) stale.push_back(entry.path().filename().string());
  for (const std::string& name : stale) {
    std::error_code error;
    fs::remove(directory / name, error);
    if (error) throw_environment_error(directory / name, "cannot be removed", error.value());
  }
}

/// How the tensor is packed, when it is; not where its parts would take the names of others.
std::optional<Packing> packing_of(const Checkpoint& model, const std::string& name,
                                  at::ScalarType dtype, PackFormat format) {
  if (format == PackFormat::dense) return std::nullopt;
  const auto packing = packing_for(model.view(name).to(dtype), format);
  model.drop(name);
  if (packing && (model.has(name + kValuesSuffix) || model.has(name + packing->places_suffix())))
    return std::nullopt;
  return packing;
}

void write_one_shard(const Checkpoint& model, const std::string& prefix, const fs::path& file,
                     const Shard& shard, PackFormat format) {
  std::map<std::string, Packing> packed;
  std::vector<TensorPlan> plan;
  for (const TensorPlan& tensor : shard.tensors) {
    const auto packing = packing_of(model, prefix + tensor.name, tensor.dtype, format);
    if (!packing) {
      plan.push_back(tensor);
      continue;
    }
    plan.push_back({tensor.name + kValuesSuffix, tensor.dtype, {packing->values}});
    plan.push_back({tensor.name + packing->places_suffix(), at::kByte, {packing->places_bytes()}});
    packed.emplace(tensor.name, *packing);
  }
  auto metadata = export_metadata();
  if (!packed.empty()) metadata[kPackedKey] = packed_metadata(packed);
  SafetensorsWriter writer(file, std::move(plan), metadata);
  for (const TensorPlan& tensor : shard.tensors) {
    const at::Tensor dense = model.view(prefix + tensor.name).to(tensor.dtype);
    const auto packing = packed.find(tensor.name);
    if (packing == packed.end()) {
      writer.append(dense);
    } else {
      const PackedTensor parts = pack(dense, packing->second);
      writer.append(parts.values);
      writer.append(parts.places);
    }
    model.drop(prefix + tensor.name);
  }
  writer.commit();
}

void write_index(const fs::path& directory, const Part& part) {
  json map = json::object();
  int64_t total = 0;
  for (size_t i = 0; i < part.shards.size(); ++i) {
    total += part.shards[i].bytes;
    for (const TensorPlan& tensor : part.shards[i].tensors) map[tensor.name] = part.file(i);
  }
  const json index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
  write_file(directory / part.index(), index.dump(2) + "\n");
}

/// Everything beside the weights of a model of parts: configurations, tokenizers, schedulers.
std::vector<std::string> files_beside_weights(const fs::path& root) {
  constexpr uintmax_t kLargest = uintmax_t{64} << 20;  // more is weights in another format
  constexpr int kMaxDepth = 3;
  std::vector<std::string> names;
  for (auto entry = fs::recursive_directory_iterator(root);
       entry != fs::recursive_directory_iterator(); ++entry) {
    if (entry.depth() == kMaxDepth) entry.disable_recursion_pending();
    const std::string name = entry->path().filename().string();
    const bool weights =
        name.find(".safetensors") != std::string::npos || name.find(".bin") != std::string::npos;
    if (entry->is_regular_file() && !weights && entry->file_size() <= kLargest)
      names.push_back(entry->path().lexically_relative(root).string());
  }
  std::sort(names.begin(), names.end());
  return names;
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

void rebase_derived(const std::filesystem::path& directory, const std::filesystem::path& base) {
  const fs::path file = directory / kDerivedFile;
  const json before = parse_json(read_file(file, kMaxConfigBytes), file.string());
  json content = before;
  content["base"] = base_path(directory, base);
  if (content != before) write_file(file, content.dump(2) + "\n");
}

void require_overwritable(const Checkpoint& model, const std::filesystem::path& directory) {
  std::vector<fs::path> targets{directory};
  for (const auto& [folder, stem] : model.parts()) targets.push_back(directory / folder);
  for (const fs::path& target : targets)
    if (const std::string name = foreign_file(target); !name.empty())
      throw UserError(
          fmt::format("{}: holds {}, which is not marked as an export of espalier; choose another "
                      "directory (export.directory, decode's OUT), or remove what lies there",
                      target.string(), name));
}

struct ModelExport::Plan {
  Checkpoint model;
  fs::path directory;
  at::ScalarType dtype;
  PackFormat format;
  std::vector<Part> parts;

  bool has_config() const {
    return model.parts().empty() && fs::exists(model.root() / kConfigFile);
  }
  std::vector<std::string> companions() const {
    return model.parts().empty() ? companion_files(model.root())
                                 : files_beside_weights(model.root());
  }
};

ModelExport::ModelExport(const Checkpoint& model, const std::filesystem::path& directory,
                         at::ScalarType dtype, int64_t shard_bytes, PackFormat format) {
  refuse_overwriting_sources(model, directory);
  std::vector<Part> parts;
  const auto add = [&](const std::string& prefix, const std::string& stem) {
    parts.push_back(
        {prefix, stem_for(stem, format), plan_shards(model, prefix, dtype, shard_bytes)});
  };
  if (model.parts().empty()) add("", kStems[0]);
  for (const auto& [folder, stem] : model.parts()) add(folder + "/", stem);
  plan_ = std::make_shared<const Plan>(Plan{model, directory, dtype, format, std::move(parts)});
}

const std::filesystem::path& ModelExport::directory() const { return plan_->directory; }

void ModelExport::begin() const {
  const fs::path& directory = plan_->directory;
  int64_t total = 0;
  for (const Part& part : plan_->parts)
    for (const Shard& shard : part.shards) total += shard.bytes;
  require_space(directory, total);
  for (const Part& part : plan_->parts) {
    std::error_code error;
    fs::create_directories(directory / part.prefix, error);
    if (error) throw_environment_error(directory, "the directory cannot be created", error.value());
    std::set<std::string> written;
    for (size_t i = 0; i < part.shards.size(); ++i) written.insert(part.file(i));
    remove_stale(directory / part.prefix, written);
  }
  for (const std::string& name : plan_->companions())
    copy_whole(plan_->model.root() / name, directory / name);
  if (plan_->has_config()) write_config(plan_->model, directory, plan_->dtype);
}

int64_t ModelExport::shards() const {
  int64_t shards = 0;
  for (const Part& part : plan_->parts) shards += static_cast<int64_t>(part.shards.size());
  return shards;
}

void ModelExport::write_shard(int64_t shard) const {
  for (const Part& part : plan_->parts) {
    const auto of_part = static_cast<int64_t>(part.shards.size());
    if (shard < of_part)
      return write_one_shard(plan_->model, part.prefix,
                             plan_->directory / part.prefix / part.file(shard), part.shards[shard],
                             plan_->format);
    shard -= of_part;
  }
  throw DefectError("an export has fewer shards than were asked for");
}

void ModelExport::finish() const {
  for (const Part& part : plan_->parts)
    if (part.shards.size() > 1) write_index(plan_->directory / part.prefix, part);
}

std::vector<std::string> ModelExport::files() const {
  std::vector<std::string> names = plan_->companions();
  if (plan_->has_config()) names.push_back(kConfigFile);
  for (const Part& part : plan_->parts) {
    for (size_t i = 0; i < part.shards.size(); ++i) names.push_back(part.prefix + part.file(i));
    if (part.shards.size() > 1) names.push_back(part.prefix + part.index());
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<std::string> write_dense(const Checkpoint& model,
                                     const std::filesystem::path& directory, at::ScalarType dtype,
                                     int64_t shard_bytes) {
  const ModelExport dense(model, directory, dtype, shard_bytes);
  dense.begin();
  for (int64_t shard = 0; shard < dense.shards(); ++shard) dense.write_shard(shard);
  dense.finish();
  return dense.files();
}

}  // namespace espalier::io
