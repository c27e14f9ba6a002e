#include "stages/retrain/adapter_file.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "pipeline/errors.h"
#include "pipeline/io/json.h"

namespace espalier::retrain {

namespace {

using train::kFrozenGroup, train::kHeadGroup;

/// Equal but for what products of other shapes round otherwise: a matrix may have lost rows since.
bool alike(const at::Tensor& a, const at::Tensor& b) {
  constexpr double kRounding = 1e-5;  // of the largest
  const auto size = [](const at::Tensor& t) { return t.defined() ? t.numel() : 0; };
  if (size(a) == 0 || size(b) == 0) return size(a) == size(b);
  if (a.sizes() != b.sizes()) return false;
  if (!at::isFloatingType(a.scalar_type())) return at::equal(a, b);
  const double largest = b.abs().max().item<double>();
  return (a - b).abs().max().item<double>() <= kRounding * largest;
}

bool alike(const model::AddedTerms& a, const model::AddedTerms& b) {
  return a.scale == b.scale && alike(a.down, b.down) && alike(a.up, b.up) &&
         alike(a.positions, b.positions) && alike(a.values, b.values) && alike(a.bias, b.bias);
}

std::string shape_text(const at::Tensor& t) {
  return fmt::format("[{}]", fmt::join(t.sizes(), ", "));
}

}  // namespace

void write_adapters(const std::filesystem::path& file, const AdaptedModel& model,
                    const train::ParameterSet& parameters, const AdapterIdentity& identity) {
  train::AdaptersFile content{identity, {}};
  const auto add = [&](const std::string& path, const at::Tensor& value) {
    content.tensors.emplace_back(path, value);
  };
  const auto& all = parameters.parameters();
  for (int64_t p = 0; p < model.first_head_parameter(); ++p) add("/" + all[p].name, all[p].value);
  for (size_t p = model.first_head_parameter(); p < all.size(); ++p)
    add(fmt::format("{}{}", kHeadGroup, all[p].name), all[p].value);
  for (const auto& [name, value] : model.adapter().frozen_tensors())
    add(fmt::format("{}{}", kFrozenGroup, name), value);
  train::write_adapters_h5(file, content);
}

StoredAdapter StoredAdapter::read(const std::filesystem::path& file) {
  const train::AdaptersFile content = train::read_adapters_h5(file);
  StoredAdapter stored;
  stored.file_ = file;
  stored.identity_ = content.identity;
  stored.matrices_ = train::matrices_of(content);
  for (const auto& [path, value] : content.tensors) {
    const std::string where = fmt::format("{}: {}", file.string(), path);
    if (path.starts_with(kFrozenGroup)) {
      stored.frozen_[path.substr(kFrozenGroup.size())] = value;
      continue;
    }
    if (value.scalar_type() != at::kFloat) throw UserError(fmt::format("{} is no float32", where));
    if (!at::isfinite(value).all().item<bool>())
      throw UserError(fmt::format("{} holds values that are not finite", where));
    if (path.starts_with(kHeadGroup))
      stored.head_[path.substr(kHeadGroup.size())] = value;
    else
      stored.values_[path.substr(1)] = value;
  }
  return stored;
}

void StoredAdapter::require_method(const std::string& method,
                                   const nlohmann::json& settings) const {
  if (identity_.method != method)
    throw UserError(fmt::format("{}: holds an adapter of {}, retrain.method is {}", file_.string(),
                                identity_.method, method));
  // As values: 32 is 32.0.
  if (io::parse_json(identity_.settings, file_.string() + ": settings") != settings)
    throw UserError(fmt::format(
        "{}: the adapter was trained with the settings {}, this run has {}; take the same",
        file_.string(), identity_.settings, settings.dump()));
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

void StoredAdapter::require_beside(const AdaptedModel& model,
                                   const io::Checkpoint& checkpoint) const {
  const at::NoGradGuard no_grad;
  for (size_t t = 0; t < model.targets().size(); ++t) {
    const Target& target = model.targets()[t];
    const auto there =
        model::load_terms(checkpoint, target.name, target.weight.size(0), target.weight.size(1));
    const auto told = model.adapter().beside(static_cast<int64_t>(t));
    if (there && told && alike(*there, *told)) continue;
    throw UserError(fmt::format(
        "retrain.adapter: previous: what stands beside {} in {} is not the adapter of {}, so going "
        "on from that would lose a part: a stage before this one added a second adapter; let "
        "that stage go on from the first (adapter: previous), or merge the first one before it",
        target.name, checkpoint.directory().string(), file_.string()));
  }
}

}  // namespace espalier::retrain
