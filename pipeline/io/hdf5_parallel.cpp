#include "pipeline/io/hdf5_parallel.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <optional>
#include <utility>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/hdf5_handles.h"

namespace espalier::io {
namespace {

void check_mpi(int result, const char* operation) {
  if (result == MPI_SUCCESS) return;
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  MPI_Error_string(result, text, &length);
  throw EnvironmentError(fmt::format("{} failed: {}", operation, std::string(text, length)));
}

/// The group's communicator of our own, freed at the end.
class Group {
 public:
  explicit Group(MPI_Comm group) {
    check_mpi(MPI_Comm_dup(group, &comm_), "MPI_Comm_dup");
    MPI_Comm_set_errhandler(comm_, MPI_ERRORS_RETURN);
    MPI_Comm_rank(comm_, &rank_);
    MPI_Comm_size(comm_, &size_);
  }
  ~Group() { MPI_Comm_free(&comm_); }
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;
  MPI_Comm comm() const { return comm_; }
  int rank() const { return rank_; }
  int size() const { return size_; }

  std::string broadcast(std::string text, int root) const {
    int64_t length = static_cast<int64_t>(text.size());
    check_mpi(MPI_Bcast(&length, 1, MPI_INT64_T, root, comm_), "MPI_Bcast");
    text.resize(static_cast<size_t>(length));
    check_mpi(MPI_Bcast(text.data(), static_cast<int>(length), MPI_BYTE, root, comm_), "MPI_Bcast");
    return text;
  }

  /// Runs `step` here and throws on every rank when it threw on one: the lowest rank's message.
  void together(const std::function<void()>& step) const {
    int failed = size_, exit_code = 0;
    std::string message;
    try {
      step();
    } catch (const Error& error) {
      failed = rank_;
      exit_code = error.exit_code();
      message = error.what();
    }
    check_mpi(MPI_Allreduce(MPI_IN_PLACE, &failed, 1, MPI_INT, MPI_MIN, comm_), "MPI_Allreduce");
    if (failed == size_) return;
    check_mpi(MPI_Bcast(&exit_code, 1, MPI_INT, failed, comm_), "MPI_Bcast");
    throw Error(exit_code, broadcast(message, failed));
  }

 private:
  MPI_Comm comm_ = MPI_COMM_NULL;
  int rank_ = 0, size_ = 1;
};

/// Elements of one row: the shape without its first size.
std::vector<int64_t> dataset_shape(const at::Tensor& rows, int64_t total_rows) {
  std::vector<int64_t> shape = rows.sizes().vec();
  shape[0] = total_rows;
  return shape;
}

}  // namespace

struct ParallelHdf5Writer::File {
  Group group;
  std::filesystem::path target;
  std::optional<AtomicFile> atomic;  // of the first rank
  Handle id;

  File(const std::filesystem::path& path, MPI_Comm comm) : group(comm), target(path) {
    prepare_hdf5();
    std::string temporary;
    group.together([&] {
      if (group.rank() != 0) return;
      atomic.emplace(path);
      temporary = atomic->temporary().string();
    });
    temporary = group.broadcast(temporary, 0);
    group.together([&] {
      const Handle access = deterministic_file_access();
      H5Pset_fapl_mpio(access, group.comm(), MPI_INFO_NULL);
      id =
          Handle(H5Fcreate(temporary.c_str(), H5F_ACC_TRUNC, deterministic_file_creation(), access),
                 H5Fclose);
      if (!id.valid()) fail("the file");
    });
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw_environment_error(target, fmt::format("{} cannot be written", what), hdf5_reason());
  }

  void require_partition(const std::string& dataset, const at::Tensor& rows, int64_t first_row,
                         int64_t total_rows) const;
  void write_own(const std::string& dataset, hid_t id, const at::Tensor& rows,
                 int64_t first_row) const;

  void attribute(const std::string& object, const std::string& name,
                 const std::variant<std::string, int64_t, double>& value) {
    group.together([&] {
      const std::lock_guard lock(hdf5_mutex());
      if (!create_attribute(id, object, name, value)) {
        fail(fmt::format("attribute \"{}\" of \"{}\"", name, object));
      }
    });
  }
};

/// The ranks' rows, in order, must be 0 to total_rows without gap or overlap.
void ParallelHdf5Writer::File::require_partition(const std::string& dataset, const at::Tensor& rows,
                                                 int64_t first_row, int64_t total_rows) const {
  if (rows.dim() == 0 || !rows.is_contiguous() || !rows.device().is_cpu()) {
    throw DefectError(fmt::format("{}: dataset \"{}\": rows must be a contiguous tensor on the CPU",
                                  target.string(), dataset));
  }
  using Range = std::pair<int64_t, int64_t>;
  const Range own{first_row, rows.size(0)};
  std::vector<Range> ranges(static_cast<size_t>(group.size()));
  static_assert(sizeof(Range) == 16);
  check_mpi(MPI_Allgather(&own, 2, MPI_INT64_T, ranges.data(), 2, MPI_INT64_T, group.comm()),
            "MPI_Allgather");
  std::sort(ranges.begin(), ranges.end());
  int64_t reached = 0;
  for (const auto& [first, count] : ranges) {
    if (count == 0) continue;
    if (first != reached) {
      throw DefectError(
          fmt::format("{}: dataset \"{}\": a rank writes rows from {} on, {} was next",
                      target.string(), dataset, first, reached));
    }
    reached += count;
  }
  if (reached != total_rows) {
    throw DefectError(fmt::format("{}: dataset \"{}\": the ranks write {} of {} rows",
                                  target.string(), dataset, reached, total_rows));
  }
}

void ParallelHdf5Writer::File::write_own(const std::string& dataset, hid_t opened,
                                         const at::Tensor& rows, int64_t first_row) const {
  std::vector<hsize_t> start(static_cast<size_t>(rows.dim()), 0);
  const std::vector<hsize_t> sizes(rows.sizes().begin(), rows.sizes().end());
  start[0] = static_cast<hsize_t>(first_row);
  const Handle space(H5Dget_space(opened), H5Sclose);
  const Handle memory(H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr),
                      H5Sclose);
  if (rows.numel() == 0) {
    H5Sselect_none(space);
    H5Sselect_none(memory);
  } else {
    H5Sselect_hyperslab(space, H5S_SELECT_SET, start.data(), nullptr, sizes.data(), nullptr);
  }
  const Handle transfer(H5Pcreate(H5P_DATASET_XFER), H5Pclose);
  H5Pset_dxpl_mpio(transfer, H5FD_MPIO_COLLECTIVE);
  if (H5Dwrite(opened, hdf5_type(rows.scalar_type()), memory, space, transfer,
               rows.const_data_ptr()) < 0) {
    fail(fmt::format("dataset \"{}\"", dataset));
  }
}

ParallelHdf5Writer::ParallelHdf5Writer(const std::filesystem::path& target, MPI_Comm group) {
  const std::lock_guard lock(hdf5_mutex());
  file_ = std::make_unique<File>(target, group);
}

ParallelHdf5Writer::~ParallelHdf5Writer() {
  const std::lock_guard lock(hdf5_mutex());
  file_.reset();
}

void ParallelHdf5Writer::write_rows(const std::string& dataset, const at::Tensor& rows,
                                    int64_t first_row, int64_t total_rows) {
  const std::lock_guard lock(hdf5_mutex());
  file_->group.together([&] { file_->require_partition(dataset, rows, first_row, total_rows); });
  Handle opened;
  file_->group.together([&] {
    opened =
        create_dataset(file_->id, dataset, rows.scalar_type(), dataset_shape(rows, total_rows));
    if (!opened.valid()) file_->fail(fmt::format("dataset \"{}\"", dataset));
  });
  file_->group.together([&] { file_->write_own(dataset, opened, rows, first_row); });
}

void ParallelHdf5Writer::attribute(const std::string& object, const std::string& name,
                                   const std::string& value) {
  file_->attribute(object, name, value);
}

void ParallelHdf5Writer::attribute(const std::string& object, const std::string& name,
                                   int64_t value) {
  file_->attribute(object, name, value);
}

void ParallelHdf5Writer::attribute(const std::string& object, const std::string& name,
                                   double value) {
  file_->attribute(object, name, value);
}

void ParallelHdf5Writer::commit() {
  const std::lock_guard lock(hdf5_mutex());
  File& file = *file_;
  file.group.together([&] {
    if (H5Fflush(file.id, H5F_SCOPE_GLOBAL) < 0 || file.id.reset() < 0) file.fail("the file");
  });
  file.group.together([&] {
    if (file.atomic) file.atomic->commit();
  });
}

}  // namespace espalier::io
