#pragma once
/// What reading and writing HDF5 share: handles that close themselves, the library's error stack as
/// text, and the types of our tensors in a file.

#include <c10/core/ScalarType.h>
#include <hdf5.h>

#include <cstdint>
#include <mutex>
#include <string>
#include <utility>
#include <variant>
#include <vector>

namespace espalier::io {

/// An HDF5 identifier, closed by `close` at the end of its life. Negative means none.
class Handle {
 public:
  using Close = herr_t (*)(hid_t);
  Handle() = default;
  Handle(hid_t id, Close close) : id_(id), close_(close) {}
  Handle(Handle&& other) noexcept : id_(std::exchange(other.id_, -1)), close_(other.close_) {}
  Handle& operator=(Handle&& other) noexcept {
    std::swap(id_, other.id_);
    std::swap(close_, other.close_);
    return *this;
  }
  ~Handle() { reset(); }
  /// Closes now; negative when the library could not (a disk is full).
  herr_t reset() { return id_ < 0 ? 0 : close_(std::exchange(id_, -1)); }
  operator hid_t() const { return id_; }
  bool valid() const { return id_ >= 0; }

 private:
  hid_t id_ = -1;
  Close close_ = nullptr;
};

/// Before any other call: silences the library's own printing of errors, forbids it to load filters
/// from outside, and needs no file locks (files appear whole).
void prepare_hdf5();
/// The library is not safe for threads: every public operation holds this.
std::recursive_mutex& hdf5_mutex();
/// The innermost reason the library gives for the last failed call.
std::string hdf5_reason();

/// The type of a tensor's elements in a file: little endian whatever the machine; 16-bit floats and
/// the 16 bits of bfloat16 included. Throws UserError for other dtypes.
Handle hdf5_type(at::ScalarType dtype);
/// bfloat16 has no HDF5 type: its bits are stored as uint16, and this attribute says so.
inline constexpr const char* kBFloat16Attribute = "bfloat16";

/// Properties under which the same calls give the same bytes: no times, a fixed format version.
Handle deterministic_file_access();
Handle deterministic_file_creation();

/// Creates a contiguous dataset, and the groups in its name. Invalid on failure.
Handle create_dataset(hid_t file, const std::string& name, at::ScalarType dtype,
                      const std::vector<int64_t>& shape);
/// Creates an attribute of one value; false on failure. Text is stored with variable length, UTF-8.
bool create_attribute(hid_t file, const std::string& object, const std::string& name,
                      const std::variant<std::string, int64_t, double>& value);

}  // namespace espalier::io
