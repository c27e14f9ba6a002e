/// residual.h5 for `espalier inspect`.

#include <ATen/ATen.h>

#include "pipeline/inspect/inspection.h"
#include "pipeline/io/safetensors_dtype.h"
#include "stages/compress/residual_file.h"

namespace espalier::compress {
namespace {

using json = nlohmann::ordered_json;

int64_t bytes_of(const QuantizedVectors& vectors) {
  return static_cast<int64_t>(vectors.codes.nbytes() + vectors.scales.nbytes());
}

json whole_rows(const std::vector<WholeTensor>& tensors) {
  json rows = json::array();
  for (const auto& [name, tensor] : tensors)
    rows.push_back({{"name", name},
                    {"shape", tensor.sizes().vec()},
                    {"dtype", std::string(io::name_of(tensor.scalar_type()))},
                    {"bytes", tensor.nbytes()}});
  return rows;
}

json describe(const std::filesystem::path& file) {
  const Residual residual = read_residual(file);
  json matrices = json::array(), tied = json::array();
  for (const ResidualMatrix& matrix : residual.matrices) {
    const EncodedMatrix& encoded = matrix.encoded;
    matrices.push_back({{"name", matrix.name},
                        {"shape", matrix.shape},
                        {"rank", encoded.truncation_rank()},
                        {"inside_mask", encoded.mask_preserving},
                        {"bytes", bytes_of(encoded.u) + bytes_of(encoded.v) +
                                      static_cast<int64_t>(encoded.diagonal.nbytes())}});
  }
  for (const auto& [name, to] : residual.tied) tied.push_back({{"name", name}, {"to", to}});
  json inspection = {{"method", residual.method},
                     {"bits", residual.bits},
                     {"polar", residual.polar},
                     {"decodes_to", dtype_name(residual.dtype)},
                     {"base_checksum", residual.base_checksum},
                     {"matrices", std::move(matrices)},
                     {"stored_whole", whole_rows(residual.whole)},
                     {"added_rows", whole_rows(residual.added)},
                     {"tied", std::move(tied)}};
  if (residual.labels) inspection["classes"] = *residual.labels;
  return inspection;
}

const inspect::FileKind registration{"espalier.residual", describe};

}  // namespace
}  // namespace espalier::compress
