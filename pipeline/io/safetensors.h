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

#include "pipeline/io/atomic_file.h"

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
  /// Gives the tensor's pages back to the system: peak memory counts them. Views stay valid (their
  /// pages are read again when touched).
  void drop(const std::string& name) const;
  /// Device, inode, size and time of change: equal while the file is the same.
  const std::string& identity() const;

 private:
  struct Mapping;
  std::shared_ptr<Mapping> mapping_;
};

/// The dtype as safetensors names it ("BF16"); throws UserError for one that espalier does not
/// store.
std::string safetensors_dtype(at::ScalarType dtype);

/// What the header of a file to be written says of one tensor.
struct TensorPlan {
  std::string name;
  at::ScalarType dtype;
  std::vector<int64_t> shape;
};

/// Writes one file atomically, a tensor at a time: the header first, from the plan, then the data
/// in the same order. Nothing is left behind unless committed.
class SafetensorsWriter {
 public:
  SafetensorsWriter(const std::filesystem::path& file, std::vector<TensorPlan> plan,
                    const std::map<std::string, std::string>& metadata = {});
  /// The next tensor of the plan: contiguous, on the CPU, of the planned dtype and shape.
  void append(const at::Tensor& tensor);
  void commit();

 private:
  AtomicFile file_;
  std::vector<TensorPlan> plan_;
  size_t next_ = 0;
};

/// Writes one file atomically. Tensors must be contiguous, on the CPU. Order: as given.
void write_safetensors(const std::filesystem::path& file,
                       const std::vector<std::pair<std::string, at::Tensor>>& tensors,
                       const std::map<std::string, std::string>& metadata = {});

}  // namespace espalier::io
