#pragma once
/// safetensors files, memory mapped in and written atomically out.
///
/// Files are hostile: header at most 100 MB, every offset inside the file, no overlap, no hole,
/// dtype and shape agree with the byte count, names unique. Messages name file, tensor and numbers.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace espalier::io {

/// One tensor of a file as the header states it.
struct TensorInfo {
  at::ScalarType dtype;
  std::vector<int64_t> shape;
  int64_t begin = 0, end = 0;  ///< bytes from the start of the file
  int64_t bytes() const { return end - begin; }
  int64_t elements() const;
};

class SafetensorsFile {
 public:
  /// Maps the file and checks its header; throws UserError.
  explicit SafetensorsFile(const std::filesystem::path& file);
  const std::map<std::string, TensorInfo>& tensors() const;
  const std::map<std::string, std::string>& metadata() const;
  const std::filesystem::path& path() const;
  /// A view on the mapped pages (read-only by agreement), kept alive by the tensor.
  at::Tensor view(const std::string& name) const;
  /// Gives the tensor's pages back to the system: peak memory counts them.
  void drop(const std::string& name) const;

 private:
  struct Mapping;
  std::shared_ptr<Mapping> mapping_;
};

/// Writes one file atomically. Tensors must be contiguous, on the CPU. Order: as given.
void write_safetensors(const std::filesystem::path& file,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace espalier::io
