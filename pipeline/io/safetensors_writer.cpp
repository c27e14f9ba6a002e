#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <set>

#include "pipeline/errors.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/io/safetensors_dtype.h"

namespace espalier::io {
namespace {

constexpr size_t kHeaderAlignment = 8;

int64_t bytes_of(const TensorPlan& plan) {
  int64_t bytes = static_cast<int64_t>(c10::elementSize(plan.dtype));
  for (const int64_t size : plan.shape) bytes *= size;
  return bytes;
}

/// Length and header text, padded with spaces so that the data begin on 8 bytes.
std::string header_of(const std::filesystem::path& file, const std::vector<TensorPlan>& plan,
                      const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::set<std::string> names{"__metadata__"};
  int64_t offset = 0;
  for (const TensorPlan& tensor : plan) {
    if (!names.insert(tensor.name).second) {
      throw DefectError(
          fmt::format("{}: tensor \"{}\" is to be written twice", file.string(), tensor.name));
    }
    const int64_t end = offset + bytes_of(tensor);
    header[tensor.name] = {{"dtype", safetensors_dtype(tensor.dtype)},
                           {"shape", tensor.shape},
                           {"data_offsets", {offset, end}}};
    offset = end;
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  text.append((kHeaderAlignment - text.size() % kHeaderAlignment) % kHeaderAlignment, ' ');
  const uint64_t length = text.size();
  return std::string(reinterpret_cast<const char*>(&length), sizeof length) + text;
}

}  // namespace

std::string safetensors_dtype(at::ScalarType dtype) {
  for (const DtypeName& entry : kDtypeNames) {
    if (entry.dtype == dtype) return std::string(entry.name);
  }
  throw UserError(
      fmt::format("dtype {} cannot be stored in safetensors; use float32, float16 or "
                  "bfloat16",
                  c10::toString(dtype)));
}

SafetensorsWriter::SafetensorsWriter(const std::filesystem::path& file,
                                     std::vector<TensorPlan> plan,
                                     const std::map<std::string, std::string>& metadata)
    : file_(file), plan_(std::move(plan)) {
  file_.write(header_of(file, plan_, metadata));
}

void SafetensorsWriter::append(const at::Tensor& tensor) {
  if (next_ == plan_.size()) throw DefectError(file_.target().string() + ": a tensor too many");
  const TensorPlan& plan = plan_[next_++];
  if (tensor.scalar_type() != plan.dtype || tensor.sizes() != at::IntArrayRef(plan.shape) ||
      !tensor.is_contiguous() || !tensor.device().is_cpu()) {
    throw DefectError(
        fmt::format("{}: tensor \"{}\" is not the contiguous CPU tensor that was planned",
                    file_.target().string(), plan.name));
  }
  file_.write({static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()});
}

void SafetensorsWriter::commit() {
  if (next_ != plan_.size()) {
    throw DefectError(fmt::format("{}: {} of {} tensors were written", file_.target().string(),
                                  next_, plan_.size()));
  }
  file_.commit();
}

void write_safetensors(const std::filesystem::path& file,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  std::vector<TensorPlan> plan;
  for (const auto& [name, tensor] : tensors) {
    plan.push_back({name, tensor.scalar_type(), tensor.sizes().vec()});
  }
  SafetensorsWriter writer(file, std::move(plan), metadata);
  for (const auto& [name, tensor] : tensors) writer.append(tensor);
  writer.commit();
}

}  // namespace espalier::io
