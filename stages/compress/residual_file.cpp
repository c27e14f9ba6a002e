#include "stages/compress/residual_file.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <set>
#include <span>
#include <string_view>

#include "pipeline/errors.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/hdf5.h"
#include "pipeline/io/json.h"
#include "stages/compress/spectrum.h"

namespace espalier::compress {
namespace {

using at::Tensor;
using nlohmann::json;

constexpr int64_t kVersion = 3;
constexpr const char* kKind = "espalier.residual";
/// Superblock, root group, object headers of five data sets (8192 bytes), and what HDF5 leaves
/// unused of the blocks of 2048 bytes in which it places tables and small data sets.
constexpr int64_t kContainerBytes = 16384;
constexpr std::array<const char*, 5> kDatasets = {"contents", "codes", "scales", "diagonals",
                                                  "whole"};

struct TypeName {
  const char* name;
  at::ScalarType type;
};
constexpr std::array<TypeName, 10> kTypes = {{{"float32", at::kFloat},
                                              {"bfloat16", at::kBFloat16},
                                              {"float16", at::kHalf},
                                              {"float64", at::kDouble},
                                              {"int64", at::kLong},
                                              {"int32", at::kInt},
                                              {"int16", at::kShort},
                                              {"int8", at::kChar},
                                              {"uint8", at::kByte},
                                              {"bool", at::kBool}}};

Tensor as_bytes(const Tensor& tensor) {
  const Tensor whole = tensor.contiguous();
  Tensor bytes = at::empty({static_cast<int64_t>(whole.nbytes())}, at::kByte);
  if (bytes.numel() > 0) std::memcpy(bytes.data_ptr(), whole.data_ptr(), whole.nbytes());
  return bytes;
}

json matrix_entry(const std::string& name, const std::vector<int64_t>& shape,
                  const EncodedMatrix& encoded) {
  json entry = {{"name", name},
                {"shape", shape},
                {"exponent", encoded.exponent},
                {"mask", encoded.mask_preserving}};
  if (encoded.truncation_rank() > 0)
    entry["rank"] = encoded.truncation_rank();
  else
    entry["entries"] = encoded.entries;
  return entry;
}

json whole_entry(const WholeTensor& whole) {
  return {{"name", whole.name},
          {"shape", whole.tensor.sizes().vec()},
          {"dtype", dtype_name(whole.tensor.scalar_type())}};
}

json tied_entry(const TiedTensor& tied) { return {{"name", tied.name}, {"to", tied.to}}; }

/// The oldest version that can say what stands in it.
int64_t version_of(const Residual& residual) {
  if (residual.labels) return 3;
  return residual.method == "ere" && residual.added.empty() && residual.tied.empty() ? 1 : 2;
}

json contents_of(const Residual& residual) {
  json contents = {{"matrices", json::array()}, {"whole", json::array()}};
  for (const auto& matrix : residual.matrices)
    contents["matrices"].push_back(matrix_entry(matrix.name, matrix.shape, matrix.encoded));
  for (const auto& tensor : residual.whole) contents["whole"].push_back(whole_entry(tensor));
  for (const auto& rows : residual.added) contents["added"].push_back(whole_entry(rows));
  for (const auto& tied : residual.tied) contents["tied"].push_back(tied_entry(tied));
  if (residual.labels) contents["labels"] = *residual.labels;
  return contents;
}

Tensor concatenation(const std::vector<Tensor>& parts, at::ScalarType type) {
  return parts.empty() ? at::empty({0}, type) : at::cat(parts).contiguous();
}

/// The five data sets in the order of kDatasets.
std::array<Tensor, 5> datasets_of(const Residual& residual) {
  std::vector<Tensor> codes, scales, diagonals, whole;
  for (const auto& matrix : residual.matrices) {
    const EncodedMatrix& encoded = matrix.encoded;
    codes.insert(codes.end(), {encoded.u.codes, encoded.v.codes});
    scales.insert(scales.end(), {encoded.u.scales, encoded.v.scales});
    diagonals.push_back(encoded.diagonal);
  }
  for (const auto* tensors : {&residual.whole, &residual.added})
    for (const auto& tensor : *tensors) whole.push_back(as_bytes(tensor.tensor));
  const std::string text = contents_of(residual).dump();
  Tensor contents = at::empty({static_cast<int64_t>(text.size())}, at::kByte);
  std::memcpy(contents.data_ptr(), text.data(), text.size());
  return {contents, concatenation(codes, at::kByte), concatenation(scales, at::kHalf),
          concatenation(diagonals, at::kHalf), concatenation(whole, at::kByte)};
}

std::string checksum_of(const std::array<Tensor, 5>& datasets, const std::string& attributes) {
  std::string all = attributes;
  for (const Tensor& tensor : datasets)
    all += io::checksum(
        std::span(static_cast<const std::byte*>(tensor.const_data_ptr()), tensor.nbytes()));
  return io::checksum(all);
}

std::string attributes_of(const Residual& residual, int64_t version) {
  const std::string attributes =
      fmt::format("{} {} {} {} {} {}", kKind, version, residual.base_checksum, residual.bits,
                  residual.polar ? 1 : 0, dtype_name(residual.dtype));
  return version == 1 ? attributes : attributes + " " + residual.method;
}

/// Takes one piece after the other from a data set that was read whole.
class Pieces {
 public:
  Pieces(Tensor all, std::string what) : all_(std::move(all)), what_(std::move(what)) {}
  Tensor take(int64_t count) {
    if (count > all_.numel() - at_)
      throw UserError(
          fmt::format("{}: the contents ask for more than its {} elements; the file is "
                      "damaged, write it again",
                      what_, all_.numel()));
    at_ += count;
    return all_.narrow(0, at_ - count, count).clone();
  }
  void finish() const {
    if (at_ != all_.numel())
      throw UserError(
          fmt::format("{}: {} of its {} elements belong to no tensor; the file is "
                      "damaged, write it again",
                      what_, all_.numel() - at_, all_.numel()));
  }

 private:
  Tensor all_;
  std::string what_;
  int64_t at_ = 0;
};

/// Reads entries of /contents; every complaint names the file.
class Contents {
 public:
  Contents(const std::string& text, std::string file)
      : file_(std::move(file)), root_(io::parse_json(text, file_ + ": /contents")) {
    if (!root_.is_object()) fail("is no object");
  }
  bool has(const char* key) const { return root_.contains(key); }
  const json& list(const char* key, bool required = true) const {
    static const json none = json::array();
    const auto found = root_.find(key);
    if (!required && found == root_.end()) return none;
    if (found == root_.end() || !found->is_array()) fail(fmt::format("has no list '{}'", key));
    return *found;
  }
  std::string text(const json& entry, const char* key) const {
    const json& value = field(entry, key);
    if (!value.is_string()) fail(fmt::format("has a tensor whose '{}' is no text", key));
    return value.get<std::string>();
  }
  /// The name, each once in the file.
  std::string name(const json& entry) {
    const std::string name = text(entry, "name");
    if (!names_.insert(name).second) fail(fmt::format("names '{}' twice", name));
    return name;
  }
  std::vector<int64_t> shape(const json& entry, const std::string& name) const {
    const json& value = field(entry, "shape");
    if (!value.is_array() || value.size() > 16) fail(fmt::format("'{}' has no shape", name));
    std::vector<int64_t> shape;
    int64_t elements = 1;
    for (const json& size : value) {
      shape.push_back(io::non_negative_integer(size));
      if (shape.back() < 0 || __builtin_mul_overflow(elements, shape.back(), &elements) ||
          elements > (int64_t{1} << 48))
        fail(fmt::format("the shape of '{}' is not one of a tensor", name));
    }
    return shape;
  }
  int64_t integer(const json& entry, const char* key, int64_t low, int64_t high) const {
    const json& value = field(entry, key);
    const bool integer = value.is_number_integer() || value.is_number_unsigned();
    const int64_t number = integer ? value.get<int64_t>() : low - 1;
    if (number < low || number > high)
      fail(fmt::format("'{}' is outside [{}, {}]", key, low, high));
    return number;
  }
  const json& field(const json& entry, const char* key) const {
    if (!entry.is_object() || !entry.contains(key)) fail(fmt::format("an entry lacks '{}'", key));
    return entry[key];
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw UserError(
        fmt::format("{}: /contents {}; the file is damaged, write it again", file_, what));
  }

 private:
  std::string file_;
  json root_;
  std::set<std::string> names_;
};

QuantizedVectors take_vectors(int64_t length, int64_t count, int64_t bits, Pieces& codes,
                              Pieces& scales) {
  return {length, count, bits, codes.take(packed_bytes(length, count, bits)),
          scales.take(scales_of(count, bits))};
}

EncodedMatrix take_matrix(const json& entry, const Folded& shape, int64_t bits,
                          const Contents& contents, Pieces& codes, Pieces& scales,
                          Pieces& diagonals) {
  EncodedMatrix encoded;
  encoded.exponent = contents.integer(entry, "exponent", -1100, 1100);
  const json& mask = contents.field(entry, "mask");
  if (!mask.is_boolean()) contents.fail("'mask' is neither true nor false");
  encoded.mask_preserving = mask.get<bool>();
  if (entry.contains("entries")) {
    if (bits > 8) contents.fail("holds single entries in 16 bits");
    encoded.entries = contents.integer(entry, "entries", 1, shape.rows * shape.columns);
    encoded.u = {shape.columns, shape.rows, bits,
                 codes.take(packed_bytes(encoded.entries, 1, bits)), scales.take(shape.rows)};
    encoded.v = take_vectors(0, 0, bits, codes, scales);
    encoded.diagonal = diagonals.take(0);
    return encoded;
  }
  const int64_t rank = contents.integer(entry, "rank", 1, std::min(shape.rows, shape.columns));
  encoded.u = take_vectors(shape.rows, rank, bits, codes, scales);
  encoded.v = take_vectors(shape.columns, rank, bits, codes, scales);
  encoded.diagonal = diagonals.take(rank);
  return encoded;
}

WholeTensor take_whole(const json& entry, const std::string& name, const Contents& contents,
                       const std::string& file, Pieces& whole) {
  const std::vector<int64_t> shape = contents.shape(entry, name);
  const at::ScalarType dtype = dtype_of(contents.text(entry, "dtype"), file);
  int64_t elements = 1;
  for (int64_t size : shape) elements *= size;
  const Tensor bytes = whole.take(elements * int64_t(c10::elementSize(dtype)));
  Tensor tensor = at::empty(shape, dtype);
  if (elements > 0) std::memcpy(tensor.data_ptr(), bytes.data_ptr(), bytes.nbytes());
  return {name, tensor};
}

void take_tensors(Residual& residual, Contents& contents, const std::string& file,
                  const std::array<Tensor, 5>& datasets) {
  Pieces codes(datasets[1], file + ": /codes"), scales(datasets[2], file + ": /scales"),
      diagonals(datasets[3], file + ": /diagonals"), whole(datasets[4], file + ": /whole");
  for (const json& entry : contents.list("matrices")) {
    const std::string name = contents.name(entry);
    const std::vector<int64_t> shape = contents.shape(entry, name);
    if (shape.size() < 2) contents.fail(fmt::format("'{}' is no matrix", name));
    residual.matrices.push_back(
        {name, shape,
         take_matrix(entry, folded(shape), residual.bits, contents, codes, scales, diagonals)});
  }
  for (const json& entry : contents.list("whole"))
    residual.whole.push_back(take_whole(entry, contents.name(entry), contents, file, whole));
  for (const json& entry : contents.list("added", false))
    residual.added.push_back(
        take_whole(entry, contents.text(entry, "name"), contents, file, whole));
  for (const json& entry : contents.list("tied", false))
    residual.tied.push_back({contents.name(entry), contents.text(entry, "to")});
  if (contents.has("labels")) {
    residual.labels.emplace();
    for (const json& name : contents.list("labels")) {
      if (!name.is_string()) contents.fail("has a name in 'labels' that is no text");
      residual.labels->push_back(name.get<std::string>());
    }
  }
  for (const Pieces* pieces : {&codes, &scales, &diagonals, &whole}) pieces->finish();
}

Residual read_attributes(const io::Hdf5Reader& reader, const std::string& file) {
  if (!reader.has_attribute("/", "kind") || reader.text_attribute("/", "kind") != kKind)
    throw UserError(
        fmt::format("{}: is no residual of espalier (attribute kind is not '{}')", file, kKind));
  const int64_t version = reader.integer_attribute("/", "version");
  if (version < 1 || version > kVersion)
    throw UserError(
        fmt::format("{}: has version {} of the format, this program reads versions 1 to {}; "
                    "use the espalier that wrote it",
                    file, version, kVersion));
  Residual residual;
  residual.base_checksum = reader.text_attribute("/", "base_checksum");
  residual.bits = reader.integer_attribute("/", "bits");
  if (version >= 2) residual.method = reader.text_attribute("/", "method");
  const bool halves = version >= 2 && residual.bits == kHalfBits;
  if (!halves && (residual.bits < 1 || residual.bits > 8))
    throw UserError(fmt::format("{}: bits is {}, outside [1, 8]", file, residual.bits));
  residual.polar = reader.integer_attribute("/", "polar") != 0;
  residual.dtype = dtype_of(reader.text_attribute("/", "dtype"), file);
  if (!at::isFloatingType(residual.dtype))
    throw UserError(fmt::format("{}: decodes to {}, which is no floating-point type", file,
                                dtype_name(residual.dtype)));
  return residual;
}

}  // namespace

std::string dtype_name(at::ScalarType dtype) {
  for (const auto& [name, type] : kTypes)
    if (type == dtype) return name;
  throw UserError(fmt::format("a residual cannot hold tensors of type {}", c10::toString(dtype)));
}

at::ScalarType dtype_of(const std::string& name, const std::string& origin) {
  for (const auto& [known, type] : kTypes)
    if (name == known) return type;
  throw UserError(fmt::format("{}: '{}' is no type of a tensor here", origin, name));
}

int64_t fixed_bytes(const std::vector<std::pair<std::string, std::vector<int64_t>>>& matrices,
                    const std::vector<WholeTensor>& other, const std::vector<TiedTensor>& tied,
                    const model::ClassNames& labels) {
  json entries = json::array();
  int64_t bytes = kContainerBytes;
  for (const auto& [name, shape] : matrices) {
    const Folded matrix = folded(shape);
    EncodedMatrix widest;
    widest.v.count = std::min(matrix.rows, matrix.columns);
    widest.exponent = -1100;
    entries.push_back(matrix_entry(name, shape, widest));
    bytes += 2;  // the two bit streams end on whole bytes
  }
  for (const auto& tensor : other) {
    entries.push_back(whole_entry(tensor));
    bytes += static_cast<int64_t>(tensor.tensor.nbytes());
  }
  for (const auto& one : tied) entries.push_back(tied_entry(one));
  const json contents = {{"matrices", entries},
                         {"whole", {}},
                         {"added", {}},
                         {"tied", {}},
                         {"labels", labels.value_or(std::vector<std::string>{})}};
  return bytes + static_cast<int64_t>(contents.dump().size());
}

void write_residual(const std::filesystem::path& file, const Residual& residual) {
  const auto datasets = datasets_of(residual);
  const int64_t version = version_of(residual);
  io::Hdf5Writer writer(file);
  for (size_t i = 0; i < datasets.size(); ++i)
    if (datasets[i].numel() > 0) writer.write(kDatasets[i], datasets[i]);
  writer.attribute("/", "kind", std::string(kKind));
  writer.attribute("/", "version", version);
  if (version > 1) writer.attribute("/", "method", residual.method);
  writer.attribute("/", "base_checksum", residual.base_checksum);
  writer.attribute("/", "bits", residual.bits);
  writer.attribute("/", "polar", int64_t{residual.polar});
  writer.attribute("/", "dtype", dtype_name(residual.dtype));
  writer.attribute("/", "checksum", checksum_of(datasets, attributes_of(residual, version)));
  writer.commit();
}

Residual read_residual(const std::filesystem::path& file) {
  const io::Hdf5Reader reader(file);
  Residual residual = read_attributes(reader, file.string());
  std::array<Tensor, 5> datasets;
  for (size_t i = 0; i < datasets.size(); ++i) {
    const at::ScalarType type = i == 2 || i == 3 ? at::kHalf : at::kByte;
    datasets[i] = reader.has(kDatasets[i]) ? reader.read(kDatasets[i], type) : at::empty({0}, type);
    if (datasets[i].dim() != 1)
      throw UserError(fmt::format("{}: /{} has {} dimensions, expected 1", file.string(),
                                  kDatasets[i], datasets[i].dim()));
  }
  const std::string attributes = attributes_of(residual, reader.integer_attribute("/", "version"));
  if (checksum_of(datasets, attributes) != reader.text_attribute("/", "checksum"))
    throw UserError(
        fmt::format("{}: its contents do not match their checksum: the file is damaged, "
                    "copy or write it again",
                    file.string()));
  const auto* text = static_cast<const char*>(datasets[0].const_data_ptr());
  Contents contents(std::string(text, datasets[0].nbytes()), file.string());
  take_tensors(residual, contents, file.string(), datasets);
  return residual;
}

}  // namespace espalier::compress
