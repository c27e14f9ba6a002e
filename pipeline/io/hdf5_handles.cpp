#include "pipeline/io/hdf5_handles.h"

#include <fmt/format.h>
#include <stdlib.h>

#include "pipeline/errors.h"

namespace espalier::io {
namespace {

herr_t keep_description(unsigned depth, const H5E_error2_t* error, void* text) {
  // From the innermost call outwards: the first says what went wrong.
  if (depth == 0 && error->desc != nullptr) *static_cast<std::string*>(text) = error->desc;
  return 0;
}

/// IEEE 754 half precision, which HDF5 1.10 has no name for.
Handle half_type() {
  Handle type(H5Tcopy(H5T_IEEE_F32LE), H5Tclose);
  H5Tset_fields(type, /*sign*/ 15, /*exponent at*/ 10, /*bits*/ 5, /*mantissa at*/ 0, /*bits*/ 10);
  H5Tset_size(type, 2);
  H5Tset_ebias(type, 15);
  return type;
}

}  // namespace

void prepare_hdf5() {
  static const bool done = [] {
    // After a write that failed (full disk) the library's own clean-up at exit crashes; every
    // handle here is closed by its owner.
    H5dont_atexit();
    ::setenv("HDF5_USE_FILE_LOCKING", "FALSE", /*overwrite=*/0);
    H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
    H5PLset_loading_state(0);
    return true;
  }();
  static_cast<void>(done);
}

std::recursive_mutex& hdf5_mutex() {
  static std::recursive_mutex mutex;
  return mutex;
}

std::string hdf5_reason() {
  std::string text;
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, keep_description, &text);
  return text.empty() ? "the HDF5 library gives no reason" : text;
}

Handle hdf5_type(at::ScalarType dtype) {
  const auto copy = [](hid_t type) { return Handle(H5Tcopy(type), H5Tclose); };
  switch (dtype) {
    case at::kFloat:
      return copy(H5T_IEEE_F32LE);
    case at::kDouble:
      return copy(H5T_IEEE_F64LE);
    case at::kHalf:
      return half_type();
    case at::kBFloat16:
      return copy(H5T_STD_U16LE);
    case at::kLong:
      return copy(H5T_STD_I64LE);
    case at::kInt:
      return copy(H5T_STD_I32LE);
    case at::kShort:
      return copy(H5T_STD_I16LE);
    case at::kChar:
      return copy(H5T_STD_I8LE);
    case at::kByte:
      return copy(H5T_STD_U8LE);
    default:
      break;
  }
  throw UserError(
      fmt::format("dtype {} cannot be stored in HDF5; use float, double, half, bfloat16 or "
                  "an integer of 8 to 64 bits",
                  c10::toString(dtype)));
}

Handle deterministic_file_access() {
  Handle properties(H5Pcreate(H5P_FILE_ACCESS), H5Pclose);
  H5Pset_libver_bounds(properties, H5F_LIBVER_EARLIEST, H5F_LIBVER_V18);
  return properties;
}

Handle deterministic_file_creation() {
  Handle properties(H5Pcreate(H5P_FILE_CREATE), H5Pclose);
  H5Pset_obj_track_times(properties, false);
  return properties;
}

Handle create_dataset(hid_t file, const std::string& name, at::ScalarType dtype,
                      const std::vector<int64_t>& shape) {
  Handle links(H5Pcreate(H5P_LINK_CREATE), H5Pclose);
  H5Pset_create_intermediate_group(links, 1);
  Handle creation(H5Pcreate(H5P_DATASET_CREATE), H5Pclose);
  H5Pset_obj_track_times(creation, false);
  H5Pset_layout(creation, H5D_CONTIGUOUS);
  // Every element is written: filling first would double the traffic.
  H5Pset_fill_time(creation, H5D_FILL_TIME_NEVER);
  H5Pset_alloc_time(creation, H5D_ALLOC_TIME_EARLY);
  const std::vector<hsize_t> sizes(shape.begin(), shape.end());
  const Handle space(shape.empty()
                         ? H5Screate(H5S_SCALAR)
                         : H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr),
                     H5Sclose);
  Handle dataset(
      H5Dcreate2(file, name.c_str(), hdf5_type(dtype), space, links, creation, H5P_DEFAULT),
      H5Dclose);
  if (dataset.valid() && dtype == at::kBFloat16 &&
      !create_attribute(file, name, kBFloat16Attribute, int64_t{1})) {
    return {};
  }
  return dataset;
}

bool create_attribute(hid_t file, const std::string& object, const std::string& name,
                      const std::variant<std::string, int64_t, double>& value) {
  Handle type;
  const void* data = nullptr;
  const char* text = nullptr;
  if (const auto* string = std::get_if<std::string>(&value)) {
    type = Handle(H5Tcopy(H5T_C_S1), H5Tclose);
    H5Tset_size(type, H5T_VARIABLE);
    H5Tset_cset(type, H5T_CSET_UTF8);
    text = string->c_str();
    data = &text;
  } else if (const auto* integer = std::get_if<int64_t>(&value)) {
    type = Handle(H5Tcopy(H5T_STD_I64LE), H5Tclose);
    data = integer;
  } else {
    type = Handle(H5Tcopy(H5T_IEEE_F64LE), H5Tclose);
    data = &std::get<double>(value);
  }
  const Handle space(H5Screate(H5S_SCALAR), H5Sclose);
  const Handle attribute(H5Acreate_by_name(file, object.c_str(), name.c_str(), type, space,
                                           H5P_DEFAULT, H5P_DEFAULT, H5P_DEFAULT),
                         H5Aclose);
  return attribute.valid() && H5Awrite(attribute, type, data) >= 0;
}

}  // namespace espalier::io
