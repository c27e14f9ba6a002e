#include "stages/compress/assembly.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/errors.h"
#include "pipeline/io/safetensors.h"

namespace espalier::compress {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kShardBytes = int64_t{1} << 30;

EncodedResult result_of(const Assembly& assembly, size_t i) {
  const MatrixPair& matrix = assembly.matrices[i];
  return assembly.journal.result(int64_t(i), matrix.rows, matrix.columns, assembly.settings.bits,
                                 matrix.mask_preserving);
}

Residual collect(const Assembly& assembly, json& figures) {
  Residual residual;
  residual.base_checksum = assembly.base_checksum;
  residual.bits = assembly.settings.bits;
  residual.polar = assembly.settings.polar;
  residual.dtype = assembly.settings.dtype;
  residual.whole = assembly.whole;
  for (size_t i = 0; i < assembly.matrices.size(); ++i) {
    const MatrixPair& matrix = assembly.matrices[i];
    const int64_t rank = assembly.truncation_ranks[i];
    json figure = {{"name", matrix.name},       {"rows", matrix.rows},
                   {"columns", matrix.columns}, {"truncation_rank", rank},
                   {"energy_kept", 0.0},        {"quantization_error", 0.0},
                   {"relative_error", 1.0},     {"mask_preserving", matrix.mask_preserving}};
    if (rank > 0) {
      const EncodedResult result = result_of(assembly, i);
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

/// One tensor of the decoded model: matrix i of the journal, or whole tensor i.
struct Source {
  bool whole;
  size_t index;
  io::TensorPlan plan;
  int64_t bytes() const {
    int64_t bytes = static_cast<int64_t>(c10::elementSize(plan.dtype));
    for (int64_t size : plan.shape) bytes *= size;
    return bytes;
  }
};

std::vector<Source> sources_of(const Assembly& assembly) {
  std::vector<Source> sources;
  for (size_t i = 0; i < assembly.matrices.size(); ++i)
    if (assembly.truncation_ranks[i] > 0)
      sources.push_back(
          {false,
           i,
           {assembly.matrices[i].name, assembly.settings.dtype, assembly.matrices[i].shape}});
  for (size_t i = 0; i < assembly.whole.size(); ++i) {
    const at::Tensor& tensor = assembly.whole[i].tensor;
    const bool floating = at::isFloatingType(tensor.scalar_type());
    sources.push_back(
        {true,
         i,
         {assembly.whole[i].name, floating ? assembly.settings.dtype : tensor.scalar_type(),
          tensor.sizes().vec()}});
  }
  return sources;
}

void write_model(const Assembly& assembly) {
  const fs::path directory = assembly.directory / "model";
  std::error_code error;
  fs::remove_all(directory, error);
  if (error)
    throw EnvironmentError(
        fmt::format("{}: cannot be removed: {}", directory.string(), error.message()));
  const std::vector<Source> sources = sources_of(assembly);
  for (size_t begin = 0, shard = 1; begin < sources.size(); ++shard) {
    size_t end = begin;
    std::vector<io::TensorPlan> plan;
    for (int64_t bytes = 0; end < sources.size(); ++end) {
      bytes += sources[end].bytes();
      if (end > begin && bytes > kShardBytes) break;
      plan.push_back(sources[end].plan);
    }
    io::SafetensorsWriter writer(directory / fmt::format("changed-{:05}.safetensors", shard), plan);
    for (; begin < end; ++begin) {
      const Source& source = sources[begin];
      writer.append(source.whole ? assembly.whole[source.index].tensor.to(source.plan.dtype)
                                 : result_of(assembly, source.index).decoded);
      assembly.still_working();
    }
    writer.commit();
  }
  io::write_derived(directory, assembly.base);
}

}  // namespace

json assemble(const Assembly& assembly) {
  const fs::path file = assembly.directory / "residual.h5";
  json figures = json::array();
  const Residual residual = collect(assembly, figures);
  write_residual(file, residual);
  write_model(assembly);
  int64_t whole_bytes = 0, masked = 0;
  for (const auto& whole : assembly.whole) whole_bytes += int64_t(whole.tensor.nbytes());
  for (const auto& matrix : residual.matrices) masked += matrix.encoded.mask_preserving;
  return {{"bytes", static_cast<int64_t>(fs::file_size(file))},
          {"whole_tensors", assembly.whole.size()},
          {"whole_bytes", whole_bytes},
          {"mask_preserving", masked},
          {"bits", residual.bits},
          {"matrices", figures}};
}

}  // namespace espalier::compress
