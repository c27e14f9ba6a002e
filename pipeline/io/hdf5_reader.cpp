#include <ATen/ops/empty.h>
#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>

#include "pipeline/errors.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/io/hdf5_handles.h"

namespace espalier::io {
namespace {

constexpr int kMaxDimensions = 16;
constexpr size_t kMaxTextBytes = size_t{64} << 20;
/// The most that HDF5's own compression (deflate) can grow when read.
constexpr uint64_t kLargestCompression = 1100;

herr_t collect_name(hid_t, const char* name, const H5L_info_t*, void* names) {
  static_cast<std::vector<std::string>*>(names)->push_back(name);
  return 0;
}

}  // namespace

struct Hdf5Reader::File {
  std::filesystem::path path;
  Handle id;
  int64_t bytes = 0;

  explicit File(const std::filesystem::path& file) : path(file) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(file, error)) {
      throw UserError(fmt::format("{}: there is no such file", file.string()));
    }
    bytes = static_cast<int64_t>(std::filesystem::file_size(file, error));
    prepare_hdf5();
    id = Handle(H5Fopen(file.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose);
    if (!id.valid()) {
      throw UserError(
          fmt::format("{}: is not an HDF5 file or is damaged ({}); make it again: token sets "
                      "by launch/prepare_data.py, all others by espalier's stages",
                      file.string(), hdf5_reason()));
    }
  }

  [[noreturn]] void refuse(const std::string& object, const std::string& problem) const {
    throw UserError(fmt::format("{}: \"{}\": {}", path.string(), object, problem));
  }

  /// Whether every part of the name is a hard link: others lead out of the file, or in circles.
  bool reaches(const std::string& name) const {
    std::string prefix;
    size_t begin = 0;
    while (begin < name.size()) {
      const size_t end = std::min(name.find('/', begin), name.size());
      if (end > begin) {
        prefix.append(1, '/').append(name, begin, end - begin);
        H5L_info_t info;
        if (H5Lexists(id, prefix.c_str(), H5P_DEFAULT) <= 0 ||
            H5Lget_info(id, prefix.c_str(), &info, H5P_DEFAULT) < 0 || info.type != H5L_TYPE_HARD) {
          return false;
        }
      }
      begin = end + 1;
    }
    return true;
  }

  Handle open_dataset(const std::string& name) const;
  std::vector<int64_t> shape_of(const std::string& name, hid_t dataset) const;
  void check_type(const std::string& name, hid_t dataset, at::ScalarType dtype) const;
  void check_storage(const std::string& name, hid_t dataset, const std::vector<int64_t>& shape,
                     size_t element_bytes) const;
  Handle open_attribute(const std::string& object, const std::string& name) const;
  at::Tensor read(const std::string& name, at::ScalarType dtype, int64_t begin, int64_t count,
                  bool whole) const;
};

Handle Hdf5Reader::File::open_dataset(const std::string& name) const {
  if (!reaches(name)) refuse(name, "there is no such dataset in the file");
  Handle dataset(H5Dopen2(id, name.c_str(), H5P_DEFAULT), H5Dclose);
  if (!dataset.valid())
    refuse(name, fmt::format("cannot be opened as a dataset: {}", hdf5_reason()));
  return dataset;
}

std::vector<int64_t> Hdf5Reader::File::shape_of(const std::string& name, hid_t dataset) const {
  const Handle space(H5Dget_space(dataset), H5Sclose);
  if (!space.valid() || H5Sget_simple_extent_type(space) == H5S_NULL) refuse(name, "has no shape");
  const int dimensions = H5Sget_simple_extent_ndims(space);
  if (dimensions < 0 || dimensions > kMaxDimensions) {
    refuse(name, fmt::format("has {} dimensions, at most {} are read", dimensions, kMaxDimensions));
  }
  std::vector<hsize_t> sizes(static_cast<size_t>(dimensions));
  H5Sget_simple_extent_dims(space, sizes.data(), nullptr);
  std::vector<int64_t> shape;
  int64_t product = 16;  // no element is wider: the bytes are counted without overflow later
  for (const hsize_t size : sizes) {
    shape.push_back(static_cast<int64_t>(size));
    if (shape.back() < 0 ||
        __builtin_mul_overflow(product, std::max<int64_t>(shape.back(), 1), &product)) {
      refuse(name, fmt::format("a size of {} makes more than 2^63 bytes", size));
    }
  }
  return shape;
}

void Hdf5Reader::File::check_type(const std::string& name, hid_t dataset,
                                  at::ScalarType dtype) const {
  const Handle stored(H5Dget_type(dataset), H5Tclose);
  const Handle expected = hdf5_type(dtype);
  if (H5Tequal(stored, expected) <= 0) {
    refuse(name,
           fmt::format("is not stored as {} (little endian) but with another type of {} bytes; "
                       "make the file again",
                       c10::toString(dtype), H5Tget_size(stored)));
  }
  if (dtype == at::kBFloat16 && H5Aexists(dataset, kBFloat16Attribute) <= 0) {
    refuse(name,
           fmt::format("holds 16-bit integers without the attribute \"{}\"", kBFloat16Attribute));
  }
}

/// The bytes that the shape asks for must be in this file, before any memory is asked for.
void Hdf5Reader::File::check_storage(const std::string& name, hid_t dataset,
                                     const std::vector<int64_t>& shape,
                                     size_t element_bytes) const {
  const Handle creation(H5Dget_create_plist(dataset), H5Pclose);
  const H5D_layout_t layout = H5Pget_layout(creation);
  if (layout == H5D_VIRTUAL || H5Pget_external_count(creation) != 0) {
    refuse(name, "its data lie in other files; copy them into this one (h5repack)");
  }
  uint64_t needed = element_bytes;
  for (const int64_t size : shape) needed *= static_cast<uint64_t>(size);
  const uint64_t stored = H5Dget_storage_size(dataset);
  const uint64_t readable = layout == H5D_CHUNKED ? kLargestCompression : 1;
  if (stored > static_cast<uint64_t>(bytes) || needed / readable > stored) {
    refuse(name,
           fmt::format("needs {} bytes, the file of {} bytes stores {} of it; it was cut off or "
                       "never filled, make it again",
                       needed, bytes, stored));
  }
}

at::Tensor Hdf5Reader::File::read(const std::string& name, at::ScalarType dtype, int64_t begin,
                                  int64_t count, bool whole) const {
  const Handle dataset = open_dataset(name);
  std::vector<int64_t> shape = shape_of(name, dataset);
  const Handle type = hdf5_type(dtype);
  check_type(name, dataset, dtype);
  check_storage(name, dataset, shape, H5Tget_size(type));
  const Handle space(H5Dget_space(dataset), H5Sclose);
  if (!whole) {
    if (shape.empty() || begin < 0 || count < 0 || begin > shape[0] - count) {
      refuse(name, fmt::format("elements [{}, {}) are asked for, it has {}", begin, begin + count,
                               shape.empty() ? 1 : shape[0]));
    }
    std::vector<hsize_t> start(shape.size(), 0), sizes(shape.begin(), shape.end());
    start[0] = static_cast<hsize_t>(begin);
    sizes[0] = static_cast<hsize_t>(count);
    shape[0] = count;
    H5Sselect_hyperslab(space, H5S_SELECT_SET, start.data(), nullptr, sizes.data(), nullptr);
  }
  at::Tensor values = at::empty(shape, at::TensorOptions().dtype(dtype));
  if (values.numel() == 0) return values;
  const std::vector<hsize_t> sizes(shape.begin(), shape.end());
  const Handle memory(sizes.empty()
                          ? H5Screate(H5S_SCALAR)
                          : H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr),
                      H5Sclose);
  if (H5Dread(dataset, type, memory, space, H5P_DEFAULT, values.mutable_data_ptr()) < 0) {
    refuse(name,
           fmt::format("cannot be read: {}; the file is damaged, make it again", hdf5_reason()));
  }
  return values;
}

Handle Hdf5Reader::File::open_attribute(const std::string& object, const std::string& name) const {
  if (!reaches(object)) refuse(object, "there is no such object in the file");
  Handle attribute(H5Aopen_by_name(id, object.c_str(), name.c_str(), H5P_DEFAULT, H5P_DEFAULT),
                   H5Aclose);
  if (!attribute.valid()) refuse(object, fmt::format("has no attribute \"{}\"", name));
  const Handle space(H5Aget_space(attribute), H5Sclose);
  if (H5Sget_simple_extent_npoints(space) != 1) {
    refuse(object, fmt::format("attribute \"{}\" is not one value", name));
  }
  return attribute;
}

Hdf5Reader::Hdf5Reader(const std::filesystem::path& file) {
  const std::lock_guard lock(hdf5_mutex());
  file_ = std::shared_ptr<File>(new File(file), [](File* opened) {
    const std::lock_guard closing(hdf5_mutex());
    delete opened;
  });
}

bool Hdf5Reader::has(const std::string& dataset) const {
  const std::lock_guard lock(hdf5_mutex());
  return file_->reaches(dataset);
}

std::vector<std::string> Hdf5Reader::children(const std::string& group) const {
  const std::lock_guard lock(hdf5_mutex());
  std::vector<std::string> names;
  if (!file_->reaches(group)) file_->refuse(group, "there is no such group in the file");
  const Handle opened(H5Gopen2(file_->id, group.c_str(), H5P_DEFAULT), H5Gclose);
  if (!opened.valid() ||
      H5Literate(opened, H5_INDEX_NAME, H5_ITER_NATIVE, nullptr, collect_name, &names) < 0) {
    file_->refuse(group, fmt::format("cannot be listed as a group: {}", hdf5_reason()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::vector<int64_t> Hdf5Reader::shape(const std::string& dataset) const {
  const std::lock_guard lock(hdf5_mutex());
  return file_->shape_of(dataset, file_->open_dataset(dataset));
}

at::Tensor Hdf5Reader::read(const std::string& dataset, at::ScalarType dtype) const {
  const std::lock_guard lock(hdf5_mutex());
  return file_->read(dataset, dtype, 0, 0, /*whole=*/true);
}

at::Tensor Hdf5Reader::read(const std::string& dataset, at::ScalarType dtype, int64_t begin,
                            int64_t count) const {
  const std::lock_guard lock(hdf5_mutex());
  return file_->read(dataset, dtype, begin, count, /*whole=*/false);
}

bool Hdf5Reader::has_attribute(const std::string& object, const std::string& name) const {
  const std::lock_guard lock(hdf5_mutex());
  return file_->reaches(object) &&
         H5Aexists_by_name(file_->id, object.c_str(), name.c_str(), H5P_DEFAULT) > 0;
}

std::string Hdf5Reader::text_attribute(const std::string& object, const std::string& name) const {
  const std::lock_guard lock(hdf5_mutex());
  const Handle attribute = file_->open_attribute(object, name);
  const Handle type(H5Aget_type(attribute), H5Tclose);
  if (H5Tget_class(type) != H5T_STRING) {
    file_->refuse(object, fmt::format("attribute \"{}\" is not a text", name));
  }
  std::string text;
  bool read = false;
  if (H5Tis_variable_str(type) > 0) {
    char* stored = nullptr;
    read = H5Aread(attribute, type, &stored) >= 0;
    if (stored != nullptr) text = stored;
    H5free_memory(stored);
  } else {
    const size_t size = H5Tget_size(type);
    if (size <= std::min(kMaxTextBytes, static_cast<size_t>(file_->bytes))) {
      text.assign(size, '\0');
      read = H5Aread(attribute, type, text.data()) >= 0;
      text.resize(std::min(text.size(), text.find('\0')));
    }
  }
  if (!read) file_->refuse(object, fmt::format("attribute \"{}\" cannot be read", name));
  try {
    (void)nlohmann::json(text).dump();
  } catch (const nlohmann::json::exception&) {
    file_->refuse(object, fmt::format("attribute \"{}\" is no UTF-8", name));
  }
  return text;
}

int64_t Hdf5Reader::integer_attribute(const std::string& object, const std::string& name) const {
  const std::lock_guard lock(hdf5_mutex());
  const Handle attribute = file_->open_attribute(object, name);
  const Handle type(H5Aget_type(attribute), H5Tclose);
  int64_t value = 0;
  if (H5Tget_class(type) != H5T_INTEGER || H5Aread(attribute, H5T_NATIVE_INT64, &value) < 0) {
    file_->refuse(object, fmt::format("attribute \"{}\" is not an integer", name));
  }
  return value;
}

double Hdf5Reader::number_attribute(const std::string& object, const std::string& name) const {
  const std::lock_guard lock(hdf5_mutex());
  const Handle attribute = file_->open_attribute(object, name);
  const Handle type(H5Aget_type(attribute), H5Tclose);
  const H5T_class_t kind = H5Tget_class(type);
  double value = 0;
  if ((kind != H5T_FLOAT && kind != H5T_INTEGER) ||
      H5Aread(attribute, H5T_NATIVE_DOUBLE, &value) < 0) {
    file_->refuse(object, fmt::format("attribute \"{}\" is not a number", name));
  }
  return value;
}

}  // namespace espalier::io
