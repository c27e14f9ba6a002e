#include "stages/compress/journal.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/json.h"
#include "pipeline/io/safetensors.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;
using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;

constexpr const char* kSpectrum = "spectrum";
constexpr const char* kEncoded = "encoded";

at::Tensor numbers(const std::vector<double>& values) { return at::tensor(values, at::kDouble); }

/// A tensor of the file, or an empty one of that type when it has none of the name.
at::Tensor read(const io::SafetensorsFile& file, const std::string& name,
                std::vector<int64_t> empty, at::ScalarType type) {
  return file.tensors().count(name) ? file.view(name).clone() : at::zeros(empty, type);
}

}  // namespace

Journal::Journal(fs::path directory, const std::string& purpose, bool owner)
    : directory_(std::move(directory)) {
  if (!owner) return;
  const fs::path note = directory_ / "purpose.txt";
  if (fs::exists(note) && io::read_file(note) == purpose) {
    io::remove_leftovers(directory_);
    return;
  }
  std::error_code error;
  fs::remove_all(directory_, error);
  if (error)
    throw EnvironmentError(
        fmt::format("{}: cannot be removed: {}", directory_.string(), error.message()));
  io::write_file(note, purpose);
}

fs::path Journal::file_of(const char* kind, int64_t i) const {
  return directory_ / fmt::format("{}-{:06}.safetensors", kind, i);
}

std::vector<int64_t> Journal::targets() const {
  const fs::path file = directory_ / "targets.json";
  if (!fs::exists(file)) return {};
  std::vector<int64_t> targets;
  for (const auto& value : io::parse_json(io::read_file(file), file.string()))
    targets.push_back(io::non_negative_integer(value));
  return targets;
}

void Journal::write_targets(const std::vector<int64_t>& targets) const {
  io::write_file(directory_ / "targets.json", nlohmann::json(targets).dump());
}

int64_t Journal::decomposed_to(int64_t i) const {
  const fs::path file = file_of(kSpectrum, i);
  if (!fs::exists(file)) return -1;
  return static_cast<int64_t>(
      io::SafetensorsFile(file).view("facts").clone().data_ptr<double>()[2]);
}

void Journal::write(int64_t i, const Decomposition& decomposition, int64_t count) const {
  NamedTensors tensors = {{"facts", numbers({decomposition.energy,
                                             double(decomposition.largest_rank), double(count)})}};
  if (decomposition.values.numel() > 0) tensors.emplace_back("values", decomposition.values);
  if (decomposition.u.numel() > 0) {
    tensors.emplace_back("u", decomposition.u);
    tensors.emplace_back("v", decomposition.v);
  }
  io::write_safetensors(file_of(kSpectrum, i), tensors);
}

Decomposition Journal::decomposition(int64_t i, bool vectors) const {
  const io::SafetensorsFile file(file_of(kSpectrum, i));
  const at::Tensor facts = file.view("facts").clone();
  Decomposition result;
  result.energy = facts.data_ptr<double>()[0];
  result.largest_rank = static_cast<int64_t>(facts.data_ptr<double>()[1]);
  result.values = read(file, "values", {0}, at::kDouble);
  if (vectors) {
    result.u = read(file, "u", {0, 0}, at::kFloat);
    result.v = read(file, "v", {0, 0}, at::kFloat);
  }
  return result;
}

bool Journal::encoded(int64_t i) const { return fs::exists(file_of(kEncoded, i)); }

void Journal::write(int64_t i, const EncodedResult& result) const {
  const EncodedMatrix& encoded = result.encoded;
  const QuantizedVectors &u = encoded.u, &v = encoded.v;
  NamedTensors tensors = {
      {"facts", numbers({double(encoded.exponent), result.energy_kept, result.errors.quantization,
                         result.errors.total, double(encoded.entries),
                         double(encoded.mask_preserving), double(u.bits), double(u.length),
                         double(u.count), double(v.length), double(v.count)})},
      {"decoded", result.decoded}};
  for (const auto& [name, tensor] : NamedTensors{{"u_scales", u.scales},
                                                 {"v_scales", v.scales},
                                                 {"diagonal", encoded.diagonal},
                                                 {"u_codes", u.codes},
                                                 {"v_codes", v.codes}})
    if (tensor.numel() > 0) tensors.emplace_back(name, tensor);
  io::write_safetensors(file_of(kEncoded, i), tensors);
}

EncodedResult Journal::result(int64_t i) const {
  const io::SafetensorsFile file(file_of(kEncoded, i));
  const at::Tensor facts = file.view("facts").clone();
  const double* fact = facts.const_data_ptr<double>();
  EncodedResult result;
  EncodedMatrix& encoded = result.encoded;
  encoded.exponent = int64_t(fact[0]);
  result.energy_kept = fact[1];
  result.errors = {fact[2], fact[3]};
  encoded.entries = int64_t(fact[4]);
  encoded.mask_preserving = fact[5] != 0;
  encoded.diagonal = read(file, "diagonal", {0}, at::kHalf);
  encoded.u = {int64_t(fact[7]), int64_t(fact[8]), int64_t(fact[6]),
               read(file, "u_codes", {0}, at::kByte), read(file, "u_scales", {0}, at::kHalf)};
  encoded.v = {int64_t(fact[9]), int64_t(fact[10]), int64_t(fact[6]),
               read(file, "v_codes", {0}, at::kByte), read(file, "v_scales", {0}, at::kHalf)};
  result.decoded = file.view("decoded");
  return result;
}

}  // namespace espalier::compress
