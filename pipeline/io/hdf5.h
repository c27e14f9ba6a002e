#pragma once
/// A thin RAII layer over HDF5 for espalier's artifacts: datasets of numbers and strings,
/// attributes, groups. Every size and type is checked against what the file says before memory is
/// allocated; errors are UserError (reading) or EnvironmentError (writing) naming file and dataset.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

namespace espalier::io {

class Hdf5Reader {
 public:
  explicit Hdf5Reader(const std::filesystem::path& file);
  bool has(const std::string& dataset) const;
  std::vector<std::string> children(const std::string& group = "/") const;  ///< sorted
  std::vector<int64_t> shape(const std::string& dataset) const;
  /// Whole dataset, converted to nothing: the stored type must be `dtype` (kFloat, kDouble, kHalf
  /// as 16-bit float, kInt, kLong, kByte, kChar, kBFloat16 as uint16 with attribute "bfloat16").
  at::Tensor read(const std::string& dataset, at::ScalarType dtype) const;
  /// Elements [begin, begin + count) along the first dimension.
  at::Tensor read(const std::string& dataset, at::ScalarType dtype, int64_t begin,
                  int64_t count) const;
  bool has_attribute(const std::string& object, const std::string& name) const;
  std::string text_attribute(const std::string& object, const std::string& name) const;
  int64_t integer_attribute(const std::string& object, const std::string& name) const;
  double number_attribute(const std::string& object, const std::string& name) const;

 private:
  struct File;
  std::shared_ptr<File> file_;
};

/// Written to a temporary name, committed whole (see AtomicFile). The same calls in the same order
/// give the same bytes (no time stamps in the file).
class Hdf5Writer {
 public:
  explicit Hdf5Writer(const std::filesystem::path& target);
  ~Hdf5Writer();
  /// Groups in the name are created. Contiguous CPU tensors.
  void write(const std::string& dataset, const at::Tensor& values);
  void attribute(const std::string& object, const std::string& name, const std::string& value);
  void attribute(const std::string& object, const std::string& name, int64_t value);
  void attribute(const std::string& object, const std::string& name, double value);
  void commit();

 private:
  struct File;
  std::unique_ptr<File> file_;
};

}  // namespace espalier::io
