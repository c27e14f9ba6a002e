#include "stages/compress/assembly.h"

#include <ATen/ATen.h>

#include <map>

#include "stages/compress/decode.h"
#include "stages/compress/model_shards.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

bool is_stored(const Assembly& assembly, size_t i) {
  return assembly.truncation_ranks.empty() || assembly.truncation_ranks[i] > 0;
}

Residual collect(const Assembly& assembly, json& figures) {
  Residual residual;
  residual.method = assembly.settings.method;
  residual.base_checksum = assembly.base_checksum;
  residual.bits = assembly.settings.bits;
  residual.polar = assembly.settings.polar;
  residual.dtype = assembly.settings.dtype;
  residual.whole = assembly.whole;
  residual.added = assembly.added;
  residual.tied = assembly.tied;
  residual.labels = assembly.labels;
  for (size_t i = 0; i < assembly.matrices.size(); ++i) {
    const MatrixPair& matrix = assembly.matrices[i];
    json figure = {{"name", matrix.name},       {"rows", matrix.rows},
                   {"columns", matrix.columns}, {"truncation_rank", nullptr},
                   {"energy_kept", 0.0},        {"quantization_error", 0.0},
                   {"relative_error", 1.0},     {"mask_preserving", matrix.mask_preserving}};
    if (!assembly.truncation_ranks.empty())
      figure["truncation_rank"] = assembly.truncation_ranks[i];
    if (is_stored(assembly, i)) {
      const EncodedResult result = assembly.journal.result(int64_t(i));
      figure["energy_kept"] = result.energy_kept;
      figure["quantization_error"] = result.errors.quantization;
      figure["relative_error"] = result.errors.total;
      residual.matrices.push_back({matrix.name, matrix.shape, result.encoded});
    }
    assembly.still_working();
    figures.push_back(std::move(figure));
  }
  return residual;
}

/// Decoded matrices come from the journal; everything else as a reader of the file decodes it.
void write_model(const Assembly& assembly, const Residual& residual) {
  std::map<std::string, int64_t> journalled;
  for (size_t i = 0; i < assembly.matrices.size(); ++i)
    if (is_stored(assembly, i)) journalled[assembly.matrices[i].name] = int64_t(i);
  for (const auto& rows : assembly.added) journalled.erase(rows.name);
  const Decoder decoder(assembly.base, residual);
  write_changed_model(
      assembly.base, decoder.plan(),
      [&](size_t i) {
        assembly.still_working();
        const auto known = journalled.find(decoder.plan()[i].name);
        return known == journalled.end() ? decoder.decode(i, residual.dtype)
                                         : assembly.journal.result(known->second).decoded;
      },
      residual.labels, assembly.directory / "model");
}

}  // namespace

json assemble(const Assembly& assembly) {
  const fs::path file = assembly.directory / "residual.h5";
  json figures = json::array();
  const Residual residual = collect(assembly, figures);
  write_residual(file, residual);
  write_model(assembly, residual);
  int64_t whole_bytes = 0, masked = 0, rows = 0;
  for (const auto& whole : assembly.whole) whole_bytes += int64_t(whole.tensor.nbytes());
  for (const auto& added : assembly.added) {
    whole_bytes += int64_t(added.tensor.nbytes());
    rows += added.tensor.size(0);
  }
  for (const auto& matrix : residual.matrices) masked += matrix.encoded.mask_preserving;
  return {{"bytes", static_cast<int64_t>(fs::file_size(file))},
          {"whole_tensors", assembly.whole.size()},
          {"whole_bytes", whole_bytes},
          {"added_rows", rows},
          {"tied_tensors", assembly.tied.size()},
          {"method", residual.method},
          {"mask_preserving", masked},
          {"bits", residual.bits},
          {"matrices", figures}};
}

}  // namespace espalier::compress
