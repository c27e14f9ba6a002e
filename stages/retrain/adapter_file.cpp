#include "stages/retrain/adapter_file.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <functional>

#include "pipeline/errors.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/io/safetensors_dtype.h"

namespace espalier::retrain {

namespace {

constexpr const char* kFrozen = "frozen";
constexpr const char* kHead = "head";

std::string type_name(at::ScalarType type) {
  for (const io::DtypeName& known : io::kDtypeNames)
    if (known.dtype == type) return std::string(known.name);
  throw DefectError(fmt::format("adapters.h5 stores no {}", c10::toString(type)));
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

std::string shape_text(const at::Tensor& t) {
  return fmt::format("[{}]", fmt::join(t.sizes(), ", "));
}

}  // namespace

void write_adapters(const std::filesystem::path& file, const AdaptedModel& model,
                    const train::ParameterSet& parameters, const AdapterIdentity& identity) {
  io::Hdf5Writer writer(file);
  const auto write = [&](const std::string& name, const at::Tensor& value) {
    writer.write(name, value.detach().contiguous());
    writer.attribute(name, "type", type_name(value.scalar_type()));
  };
  const auto& all = parameters.parameters();
  for (int64_t p = 0; p < model.first_head_parameter(); ++p) write("/" + all[p].name, all[p].value);
  for (size_t p = model.first_head_parameter(); p < all.size(); ++p)
    write(fmt::format("/{}/{}", kHead, all[p].name), all[p].value);
  for (const auto& [name, value] : model.adapter().frozen_tensors())
    write(fmt::format("/{}/{}", kFrozen, name), value);
  writer.attribute("/", "method", identity.method);
  writer.attribute("/", "settings", identity.settings);
  writer.attribute("/", "base_checksum", identity.base_checksum);
  writer.commit();
}

StoredAdapter StoredAdapter::read(const std::filesystem::path& file) {
  if (!std::filesystem::exists(file))
    throw UserError(fmt::format("{}: there is no such file of adapters", file.string()));
  const io::Hdf5Reader reader(file);
  StoredAdapter stored;
  stored.file_ = file;
  stored.identity_ = {reader.text_attribute("/", "method"), reader.text_attribute("/", "settings"),
                      reader.text_attribute("/", "base_checksum")};
  const std::string head = fmt::format("/{}/", kHead), frozen = fmt::format("/{}/", kFrozen);
  for_each_dataset(reader, "", [&](const std::string& path) {
    const std::string where = fmt::format("{}: {}", file.string(), path);
    const at::Tensor value = reader.read(path, type_of(reader.text_attribute(path, "type"), where));
    if (path.starts_with(frozen)) {
      stored.frozen_[path.substr(frozen.size())] = value;
      return;
    }
    if (value.scalar_type() != at::kFloat) throw UserError(fmt::format("{} is no float32", where));
    if (!at::isfinite(value).all().item<bool>())
      throw UserError(fmt::format("{} holds values that are not finite", where));
    if (path.starts_with(head))
      stored.head_[path.substr(head.size())] = value;
    else
      stored.values_[path.substr(1)] = value;
  });
  return stored;
}

void StoredAdapter::require_method(const AdapterIdentity& wanted) const {
  if (identity_.method != wanted.method)
    throw UserError(fmt::format("{}: holds an adapter of {}, retrain.method is {}", file_.string(),
                                identity_.method, wanted.method));
  if (identity_.settings != wanted.settings)
    throw UserError(fmt::format(
        "{}: the adapter was trained with the settings {}, this run has {}; take the same",
        file_.string(), identity_.settings, wanted.settings));
}

void StoredAdapter::require_base(const std::string& base_checksum, const std::string& model) const {
  if (identity_.base_checksum == base_checksum) return;
  throw UserError(fmt::format(
      "{}: the adapter stands on a base with the checksum {}, {} has {}; give it the model that it "
      "was trained on",
      file_.string(), identity_.base_checksum, model, base_checksum));
}

bool StoredAdapter::copy_into(train::ParameterSet& parameters, const AdaptedModel& model,
                              bool with_head) const {
  const at::NoGradGuard no_grad;
  const auto& all = parameters.parameters();
  const int64_t first_head = model.first_head_parameter();
  for (int64_t p = 0; p < first_head; ++p) {
    const auto found = values_.find(all[p].name);
    if (found == values_.end())
      throw UserError(
          fmt::format("{}: has no parameter {}; retrain.targets must be those it was trained with",
                      file_.string(), all[p].name));
    if (found->second.sizes() != all[p].value.sizes())
      throw UserError(fmt::format("{}: {} has shape {}, this run asks for {}", file_.string(),
                                  all[p].name, shape_text(found->second),
                                  shape_text(all[p].value)));
    all[p].value.detach().copy_(found->second);
  }
  if (static_cast<int64_t>(values_.size()) != first_head) {
    std::map<std::string, at::Tensor> left = values_;
    for (int64_t p = 0; p < first_head; ++p) left.erase(all[p].name);
    throw UserError(
        fmt::format("{}: holds {} too, which this run does not train; "
                    "retrain.targets must be those it was trained with",
                    file_.string(), left.begin()->first));
  }
  bool fits = with_head && first_head < static_cast<int64_t>(all.size());
  for (size_t p = first_head; p < all.size(); ++p) {
    const auto found = head_.find(all[p].name);
    fits = fits && found != head_.end() && found->second.sizes() == all[p].value.sizes();
  }
  for (size_t p = first_head; fits && p < all.size(); ++p)
    all[p].value.detach().copy_(head_.at(all[p].name));
  return fits;
}

}  // namespace espalier::retrain
