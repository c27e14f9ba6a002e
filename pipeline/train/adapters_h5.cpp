#include "pipeline/train/adapters_h5.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <functional>

#include "pipeline/errors.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/io/safetensors_dtype.h"
#include "pipeline/model/added_terms.h"

namespace espalier::train {
namespace {

constexpr const char* kTermMark = ".added.";  // "M.added.down": pipeline/model/added_terms.h

std::string type_name(at::ScalarType type) {
  const std::string_view name = io::name_of(type);
  if (name.empty()) throw DefectError(fmt::format("adapters.h5 stores no {}", c10::toString(type)));
  return std::string(name);
}

at::ScalarType type_of(const std::string& name, const std::string& where) {
  for (const io::DtypeName& known : io::kDtypeNames)
    if (known.name == name) return known.dtype;
  throw UserError(fmt::format("{}: '{}' is no type of a tensor", where, name));
}

/// Gives every data set below `group` ("" is the root) to `take`.
void for_each_dataset(const io::Hdf5Reader& reader, const std::string& group,
                      const std::function<void(const std::string&)>& take, int depth = 0) {
  if (depth > 64) throw UserError(fmt::format("{}: groups are nested too deep", group));
  for (const std::string& child : reader.children(group.empty() ? "/" : group)) {
    const std::string path = group + "/" + child;
    if (reader.has_attribute(path, "type"))
      take(path);
    else
      for_each_dataset(reader, path, take, depth + 1);
  }
}

/// Whether a file of this directory alone holds the terms of one of the matrices.
bool writes_terms(const std::filesystem::path& directory,
                  const std::vector<std::string>& matrices) {
  if (!std::filesystem::is_directory(directory)) return false;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    if (entry.path().extension() != ".safetensors") continue;
    const io::SafetensorsFile file(entry.path());
    for (const std::string& matrix : matrices)
      if (file.tensors().contains(matrix + kTermMark + "down")) return true;
  }
  return false;
}

}  // namespace

AdaptersFile read_adapters_h5(const std::filesystem::path& file) {
  if (!std::filesystem::exists(file))
    throw UserError(fmt::format("{}: there is no such file of adapters", file.string()));
  const io::Hdf5Reader reader(file);
  AdaptersFile content{
      {reader.text_attribute("/", "method"), reader.text_attribute("/", "settings"),
       reader.text_attribute("/", "base_checksum")},
      {}};
  for_each_dataset(reader, "", [&](const std::string& path) {
    const std::string where = fmt::format("{}: {}", file.string(), path);
    content.tensors.emplace_back(
        path, reader.read(path, type_of(reader.text_attribute(path, "type"), where)));
  });
  return content;
}

void write_adapters_h5(const std::filesystem::path& file, const AdaptersFile& content) {
  io::Hdf5Writer writer(file);
  for (const auto& [path, value] : content.tensors) {
    writer.write(path, value.detach().contiguous());
    writer.attribute(path, "type", type_name(value.scalar_type()));
  }
  writer.attribute("/", "method", content.identity.method);
  writer.attribute("/", "settings", content.identity.settings);
  writer.attribute("/", "base_checksum", content.identity.base_checksum);
  writer.commit();
}

std::set<std::string> matrices_of(const AdaptersFile& content) {
  std::set<std::string> matrices;
  for (const auto& [path, value] : content.tensors)
    if (!path.starts_with(kFrozenGroup) && !path.starts_with(kHeadGroup))
      matrices.insert(path.substr(1, path.rfind('/') - 1));
  return matrices;
}

io::Checkpoint without_terms(const io::Checkpoint& model, const std::set<std::string>& matrices) {
  return model.without([&](const std::string& name) {
    return model::is_term(name) && matrices.contains(name.substr(0, name.rfind(kTermMark)));
  });
}

std::filesystem::path adapters_beside(const io::Checkpoint& model) {
  const std::vector<std::string> matrices = model::matrices_with_terms(model);
  if (matrices.empty()) return {};
  for (const std::filesystem::path& directory : model.chain()) {
    if (!writes_terms(directory, matrices)) continue;
    const std::filesystem::path file = directory.parent_path() / "adapters.h5";
    return std::filesystem::exists(file) ? file : std::filesystem::path();
  }
  return {};
}

}  // namespace espalier::train
