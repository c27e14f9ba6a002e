#include "pipeline/io/packed_header.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <charconv>

#include "pipeline/errors.h"
#include "pipeline/io/json.h"

namespace espalier::io {
namespace {

using nlohmann::json;

constexpr size_t kMaxDimensions = 64;

/// "2:4" as two numbers; nothing when the text is no such pattern.
bool read_pattern(const std::string& text, int64_t& keep, int64_t& group) {
  const char* end = text.data() + text.size();
  const auto [colon, bad_keep] = std::from_chars(text.data(), end, keep);
  if (bad_keep != std::errc() || colon == end || *colon != ':') return false;
  const auto [rest, bad_group] = std::from_chars(colon + 1, end, group);
  return bad_group == std::errc() && rest == end && keep >= 1 && keep < group &&
         group <= kLargestGroup;
}

/// One packed tensor's entry while it is read.
class Entry {
 public:
  Entry(const SafetensorsFile& file, const std::string& name, const json& value)
      : file_(file), name_(name), value_(value) {}

  Packing read() const {
    if (!value_.is_object()) refuse("its entry is not an object");
    const TensorInfo& values = part(kValuesSuffix);
    Packing packing{{values.dtype, read_shape()}, values.elements()};
    packing.dense.end = dense_bytes(packing.dense);
    read_kind(packing);
    require_values(packing);
    const TensorInfo& places = part(packing.places_suffix());
    if (places.dtype != at::kByte || places.bytes() != packing.places_bytes())
      refuse(fmt::format("{}{} holds {} bytes of dtype {}; [{}] packed as {} needs {} of U8", name_,
                         packing.places_suffix(), places.bytes(), safetensors_dtype(places.dtype),
                         fmt::join(packing.dense.shape, ", "), packing.name(),
                         packing.places_bytes()));
    return packing;
  }

 private:
  [[noreturn]] void refuse(const std::string& problem) const {
    throw UserError(fmt::format("{}: tensor \"{}\", which is packed: {}", file_.path().string(),
                                name_, problem));
  }

  const json* field(const char* key) const {
    const auto found = value_.find(key);
    return found == value_.end() ? nullptr : &*found;
  }

  const TensorInfo& part(const char* suffix) const {
    const auto found = file_.tensors().find(name_ + suffix);
    if (found == file_.tensors().end())
      refuse(fmt::format("the file does not hold {}{}", name_, suffix));
    if (found->second.shape.size() != 1)
      refuse(fmt::format("{}{} has shape [{}], not one dimension", name_, suffix,
                         fmt::join(found->second.shape, ", ")));
    return found->second;
  }

  std::vector<int64_t> read_shape() const {
    const json* value = field("shape");
    if (value == nullptr || !value->is_array() || value->empty() || value->size() > kMaxDimensions)
      refuse(fmt::format("its \"shape\" is not an array of 1 to {} sizes", kMaxDimensions));
    std::vector<int64_t> shape;
    for (const json& size : *value) {
      shape.push_back(non_negative_integer(size));
      if (shape.back() < 1) refuse("a size of its \"shape\" is not an integer from 1 to 2^63 - 1");
    }
    return shape;
  }

  int64_t dense_bytes(const TensorInfo& dense) const {
    auto bytes = static_cast<int64_t>(c10::elementSize(dense.dtype));
    for (const int64_t size : dense.shape)
      if (__builtin_mul_overflow(bytes, size, &bytes))
        refuse(fmt::format("shape [{}] has more bytes than 2^63", fmt::join(dense.shape, ", ")));
    return bytes;
  }

  void read_kind(Packing& packing) const {
    const json* kind = field("packing");
    const std::string text = kind != nullptr && kind->is_string() ? kind->get<std::string>() : "";
    if (text == "bitmask") return;
    if (!read_pattern(text, packing.keep, packing.group))
      refuse(fmt::format("its \"packing\" is neither \"bitmask\" nor N:M with 1 <= N < M <= {}",
                         kLargestGroup));
    const json* axis = field("axis");
    const int64_t number = axis == nullptr ? -1 : non_negative_integer(*axis);
    if (packing.dense.shape.size() != 2 || (number != 0 && number != 1))
      refuse(fmt::format("{} is for matrices, with an \"axis\" of 0 or 1; its shape is [{}]", text,
                         fmt::join(packing.dense.shape, ", ")));
    packing.axis = static_cast<size_t>(number);
  }

  void require_values(const Packing& packing) const {
    const int64_t elements = packing.dense.elements();
    if (packing.bitmask()) {
      if (packing.values > elements)
        refuse(fmt::format("{} values are stored, and shape [{}] has {} elements", packing.values,
                           fmt::join(packing.dense.shape, ", "), elements));
      return;
    }
    const int64_t expected = elements / packing.group * packing.keep;
    if (packing.dense.shape[packing.axis] % packing.group != 0 || packing.values != expected)
      refuse(
          fmt::format("{} values are stored; {} along dimension {} of [{}] needs sizes that {} "
                      "divides, and {} values",
                      packing.values, packing.name(), packing.axis,
                      fmt::join(packing.dense.shape, ", "), packing.group, expected));
  }

  const SafetensorsFile& file_;
  const std::string& name_;
  const json& value_;
};

}  // namespace

std::string packed_metadata(const std::map<std::string, Packing>& packed) {
  json list = json::object();
  for (const auto& [name, packing] : packed) {
    list[name] = {{"packing", packing.name()}, {"shape", packing.dense.shape}};
    if (!packing.bitmask()) list[name]["axis"] = packing.axis;
  }
  return list.dump(-1, ' ', false, json::error_handler_t::replace);
}

std::map<std::string, Packing> packed_tensors(const SafetensorsFile& file) {
  const auto said = file.metadata().find(kPackedKey);
  if (said == file.metadata().end()) return {};
  const std::string origin =
      fmt::format("{}: __metadata__ \"{}\"", file.path().string(), kPackedKey);
  const json list = parse_json(said->second, origin, /*max_depth=*/4);
  if (!list.is_object()) throw UserError(origin + " is not a JSON object");
  std::map<std::string, Packing> packed;
  for (const auto& [name, value] : list.items()) {
    if (file.tensors().count(name) > 0)
      throw UserError(fmt::format("{}: tensor \"{}\" stands there twice, packed and as it is",
                                  file.path().string(), name));
    packed.emplace(name, Entry(file, name, value).read());
  }
  return packed;
}

}  // namespace espalier::io
