#include "pipeline/io/safetensors_header.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/io/json.h"
#include "pipeline/io/safetensors_dtype.h"

namespace espalier::io {
namespace {

using nlohmann::json;

constexpr int64_t kLengthBytes = 8;
constexpr int kMaxDepth = 8;  // a header has four levels
constexpr size_t kMaxDimensions = 64;

std::string readable_dtypes() {
  std::string list;
  for (const DtypeName& entry : kDtypeNames)
    list += (list.empty() ? "" : ", ") + std::string(entry.name);
  return list;
}

/// The value's text, short enough for a message.
std::string excerpt(const json& value) {
  std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  if (text.size() > 80) text.replace(80, std::string::npos, "...");
  return text;
}

/// One tensor's entry while it is read; its messages name file and tensor.
class Entry {
 public:
  Entry(const std::string& file, const std::string& name, const json& value)
      : file_(file), name_(name), value_(value) {
    if (!value.is_object())
      refuse(fmt::format("its entry is not an object but {}", excerpt(value)));
  }

  TensorInfo read(int64_t data_begin, int64_t data_bytes) const {
    TensorInfo info{read_dtype(), read_shape()};
    const auto [begin, end] = read_offsets(data_bytes);
    const int64_t expected = checked_bytes(info);
    if (end - begin != expected) {
      refuse(fmt::format("dtype {} and shape {} need {} bytes, its offsets [{}, {}] give it {}",
                         excerpt(value_["dtype"]), excerpt(value_["shape"]), expected, begin, end,
                         end - begin));
    }
    info.begin = data_begin + begin;
    info.end = data_begin + end;
    return info;
  }

 private:
  [[noreturn]] void refuse(const std::string& problem) const {
    throw UserError(fmt::format("{}: tensor \"{}\": {}", file_, name_, problem));
  }

  const json& field(const char* key) const {
    const auto found = value_.find(key);
    if (found == value_.end()) refuse(fmt::format("its entry has no \"{}\"", key));
    return *found;
  }

  at::ScalarType read_dtype() const {
    const json& value = field("dtype");
    for (const DtypeName& entry : kDtypeNames) {
      if (value.is_string() && value.get_ref<const std::string&>() == entry.name)
        return entry.dtype;
    }
    refuse(fmt::format("dtype {} is not one that espalier reads ({}); convert the checkpoint",
                       excerpt(value), readable_dtypes()));
  }

  std::vector<int64_t> read_shape() const {
    const json& value = field("shape");
    if (!value.is_array() || value.size() > kMaxDimensions) {
      refuse(fmt::format("shape {} is not an array of at most {} sizes", excerpt(value),
                         kMaxDimensions));
    }
    std::vector<int64_t> shape;
    for (const json& size : value) {
      shape.push_back(non_negative_integer(size));
      if (shape.back() < 0) {
        refuse(fmt::format("shape {}: {} is not an integer from 0 to 2^63 - 1", excerpt(value),
                           excerpt(size)));
      }
    }
    return shape;
  }

  std::pair<int64_t, int64_t> read_offsets(int64_t data_bytes) const {
    const json& value = field("data_offsets");
    if (!value.is_array() || value.size() != 2 || non_negative_integer(value[0]) < 0 ||
        non_negative_integer(value[1]) < 0) {
      refuse(fmt::format("data_offsets {} are not two integers from 0 on", excerpt(value)));
    }
    const int64_t begin = non_negative_integer(value[0]), end = non_negative_integer(value[1]);
    if (begin > end) refuse(fmt::format("its data begin at {} and end before, at {}", begin, end));
    if (end > data_bytes) {
      refuse(
          fmt::format("its data end at byte {} but the file holds {} bytes of data; it was cut "
                      "off, copy it again",
                      end, data_bytes));
    }
    return {begin, end};
  }

  int64_t checked_bytes(const TensorInfo& info) const {
    int64_t product = static_cast<int64_t>(c10::elementSize(info.dtype));
    // A zero makes the product zero whatever the others are, but ATen multiplies them for strides.
    for (const int64_t size : info.shape) {
      if (__builtin_mul_overflow(product, std::max<int64_t>(size, 1), &product)) {
        refuse(fmt::format("shape {} has more bytes than 2^63", excerpt(value_["shape"])));
      }
    }
    const bool empty = std::count(info.shape.begin(), info.shape.end(), 0) > 0;
    return empty ? 0 : product;
  }

  const std::string& file_;
  const std::string& name_;
  const json& value_;
};

std::map<std::string, std::string> read_metadata(const json& value, const std::string& file) {
  if (!value.is_object()) {
    throw UserError(fmt::format("{}: __metadata__ is not an object but {}", file, excerpt(value)));
  }
  std::map<std::string, std::string> metadata;
  for (const auto& [key, text] : value.items()) {
    if (!text.is_string()) {
      throw UserError(
          fmt::format("{}: __metadata__ \"{}\" is not a string but {}", file, key, excerpt(text)));
    }
    metadata.emplace(key, text.get<std::string>());
  }
  return metadata;
}

/// The data of the tensors, one after the other, must be the data of the file: what overlaps or
/// stands between is either damage or a smuggled second content.
void refuse_overlaps_and_holes(const std::map<std::string, TensorInfo>& tensors, int64_t data_begin,
                               int64_t file_bytes, const std::string& file) {
  std::vector<const std::pair<const std::string, TensorInfo>*> order;
  for (const auto& entry : tensors) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  int64_t reached = data_begin;
  const std::string* previous = nullptr;
  for (const auto* entry : order) {
    const int64_t begin = entry->second.begin;
    if (begin < reached) {
      throw UserError(
          fmt::format("{}: tensor \"{}\" begins at byte {} of the data, inside tensor "
                      "\"{}\", which ends at {}",
                      file, entry->first, begin - data_begin, *previous, reached - data_begin));
    }
    if (begin > reached) {
      throw UserError(
          fmt::format("{}: bytes {} to {} of the data, before tensor \"{}\", belong to no "
                      "tensor",
                      file, reached - data_begin, begin - data_begin, entry->first));
    }
    reached = entry->second.end;
    previous = &entry->first;
  }
  if (reached != file_bytes) {
    throw UserError(
        fmt::format("{}: the last {} bytes belong to no tensor: the data end at byte {} of "
                    "{}",
                    file, file_bytes - reached, reached, file_bytes));
  }
}

}  // namespace

SafetensorsHeader parse_safetensors_header(const char* start, int64_t file_bytes,
                                           const std::string& file) {
  if (file_bytes < kLengthBytes) {
    throw UserError(
        fmt::format("{}: has {} bytes, a safetensors file has at least {}; it was cut off, "
                    "copy it again",
                    file, file_bytes, kLengthBytes));
  }
  uint64_t header_bytes = 0;  // little endian, as every machine we run on
  std::memcpy(&header_bytes, start, sizeof header_bytes);
  if (header_bytes > static_cast<uint64_t>(kMaxHeaderBytes)) {
    throw UserError(
        fmt::format("{}: its header claims {} bytes, at most {} are allowed; it is not a "
                    "safetensors file or is damaged",
                    file, header_bytes, kMaxHeaderBytes));
  }
  const int64_t data_begin = kLengthBytes + static_cast<int64_t>(header_bytes);
  if (data_begin > file_bytes) {
    throw UserError(
        fmt::format("{}: its header ends at byte {} but the file has {}; it was cut off, "
                    "copy it again",
                    file, data_begin, file_bytes));
  }
  const json header = parse_json({start + kLengthBytes, static_cast<size_t>(header_bytes)},
                                 file + ": the header", kMaxDepth);
  if (!header.is_object()) {
    throw UserError(
        fmt::format("{}: the header is not a JSON object but {}", file, excerpt(header)));
  }
  SafetensorsHeader result;
  for (const auto& [name, value] : header.items()) {
    if (name == "__metadata__") {
      result.metadata = read_metadata(value, file);
    } else {
      result.tensors.emplace(name,
                             Entry(file, name, value).read(data_begin, file_bytes - data_begin));
    }
  }
  refuse_overlaps_and_holes(result.tensors, data_begin, file_bytes, file);
  return result;
}

}  // namespace espalier::io
