#include <fmt/format.h>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/io/hdf5_handles.h"

namespace espalier::io {

struct Hdf5Writer::File {
  AtomicFile atomic;
  Handle id;

  explicit File(const std::filesystem::path& target) : atomic(target) {
    prepare_hdf5();
    const Handle access = deterministic_file_access();
    id = Handle(
        H5Fcreate(atomic.temporary().c_str(), H5F_ACC_TRUNC, deterministic_file_creation(), access),
        H5Fclose);
    if (!id.valid()) fail("the file");
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw_environment_error(atomic.target(), what + " cannot be written", hdf5_reason());
  }

  void attribute(const std::string& object, const std::string& name,
                 const std::variant<std::string, int64_t, double>& value) {
    const std::lock_guard lock(hdf5_mutex());
    if (!create_attribute(id, object, name, value)) {
      fail(fmt::format("attribute \"{}\" of \"{}\"", name, object));
    }
  }
};

Hdf5Writer::Hdf5Writer(const std::filesystem::path& target) {
  const std::lock_guard lock(hdf5_mutex());
  file_ = std::make_unique<File>(target);
}

Hdf5Writer::~Hdf5Writer() {
  const std::lock_guard lock(hdf5_mutex());
  file_.reset();
}

void Hdf5Writer::write(const std::string& dataset, const at::Tensor& values) {
  if (!values.is_contiguous() || !values.device().is_cpu()) {
    throw DefectError(fmt::format("{}: dataset \"{}\": not a contiguous tensor on the CPU",
                                  file_->atomic.target().string(), dataset));
  }
  const std::lock_guard lock(hdf5_mutex());
  const Handle target =
      create_dataset(file_->id, dataset, values.scalar_type(), values.sizes().vec());
  const bool written =
      target.valid() &&
      (values.numel() == 0 || H5Dwrite(target, hdf5_type(values.scalar_type()), H5S_ALL, H5S_ALL,
                                       H5P_DEFAULT, values.const_data_ptr()) >= 0);
  if (!written) file_->fail(fmt::format("dataset \"{}\"", dataset));
}

void Hdf5Writer::attribute(const std::string& object, const std::string& name,
                           const std::string& value) {
  file_->attribute(object, name, value);
}

void Hdf5Writer::attribute(const std::string& object, const std::string& name, int64_t value) {
  file_->attribute(object, name, value);
}

void Hdf5Writer::attribute(const std::string& object, const std::string& name, double value) {
  file_->attribute(object, name, value);
}

void Hdf5Writer::commit() {
  const std::lock_guard lock(hdf5_mutex());
  // Flushed before it is closed: a close that fails leaves no way to say why.
  if (H5Fflush(file_->id, H5F_SCOPE_GLOBAL) < 0) file_->fail("the file");
  if (file_->id.reset() < 0) file_->fail("the file");
  file_->atomic.commit();
}

}  // namespace espalier::io
