#pragma once
/// One HDF5 file written by all ranks of a group, each rank its own rows of every dataset.
///
/// Every call is collective over the group: same order, same names, same element type and row
/// shape. An error on any rank is thrown on all of them, with that rank's message. The bytes do not
/// depend on how many ranks there are. Written to a temporary name, renamed by the group's first
/// rank at commit.

#include <ATen/core/Tensor.h>
#include <mpi.h>

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>

namespace espalier::io {

class ParallelHdf5Writer {
 public:
  /// MPI must be initialised; the group is duplicated. Throws EnvironmentError.
  ParallelHdf5Writer(const std::filesystem::path& target, MPI_Comm group);
  ~ParallelHdf5Writer();

  /// `rows` [count, ...] become rows [first_row, first_row + count) of the dataset
  /// [total_rows, ...]; contiguous, on the CPU, `count` may be 0. The ranks' rows must cover the
  /// dataset once, else DefectError.
  void write_rows(const std::string& dataset, const at::Tensor& rows, int64_t first_row,
                  int64_t total_rows);
  void attribute(const std::string& object, const std::string& name, const std::string& value);
  void attribute(const std::string& object, const std::string& name, int64_t value);
  void attribute(const std::string& object, const std::string& name, double value);
  void commit();

 private:
  struct File;
  std::unique_ptr<File> file_;
};

}  // namespace espalier::io
