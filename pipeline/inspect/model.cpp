#include "pipeline/inspect/model.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/inspect/run.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/safetensors_dtype.h"
#include "pipeline/model/added_terms.h"
#include "pipeline/model/architecture.h"

namespace espalier::inspect {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::ordered_json;

struct Ratio {
  int64_t nonzeros, of;
};
constexpr Ratio kPatterns[] = {{1, 4}, {2, 8}, {2, 4}, {4, 8}};  // the sparsest first

/// Whether no `ratio.of` neighbours of a row have more than `ratio.nonzeros` that are not 0.
bool has_pattern(const at::Tensor& nonzero, const Ratio& ratio) {
  if (nonzero.size(1) % ratio.of != 0) return false;
  return (nonzero.reshape({-1, ratio.of}).sum(1) <= ratio.nonzeros).all().item<bool>();
}

/// "2:4" of a matrix, along its rows or, where layers are stored [in, out], its columns.
std::string pattern_of(const at::Tensor& tensor, int64_t nonzeros) {
  if (tensor.dim() != 2 || nonzeros == 0) return "";
  for (const Ratio& ratio : kPatterns) {
    if (nonzeros * ratio.of > tensor.numel() * ratio.nonzeros) continue;
    for (const at::Tensor& side : {tensor, tensor.t()})
      if (has_pattern(side.ne(0), ratio)) return fmt::format("{}:{}", ratio.nonzeros, ratio.of);
  }
  return "";
}

int64_t heads_removed(const model::Architecture& architecture) {
  int64_t removed = 0;
  for (int64_t block = 0; block < architecture.blocks; ++block)
    removed += architecture.heads - architecture.heads_of(block).queries();
  return removed;
}

}  // namespace

json describe_model(const fs::path& path) {
  c10::InferenceMode guard;
  const io::Checkpoint checkpoint = io::Checkpoint::open(path);
  json tensors = json::array();
  int64_t parameters = 0, nonzeros = 0, stored_bytes = 0;
  for (const std::string& name : checkpoint.names()) {
    const at::Tensor tensor = checkpoint.view(name);
    const int64_t there = at::count_nonzero(tensor).item<int64_t>();
    const auto elements = static_cast<double>(std::max<int64_t>(1, tensor.numel()));
    json row = {{"name", name},
                {"shape", tensor.sizes().vec()},
                {"dtype", std::string(io::name_of(tensor.scalar_type()))},
                {"bytes", tensor.nbytes()},
                {"nonzeros", there},
                {"sparsity", 1 - static_cast<double>(there) / elements},
                {"pattern", pattern_of(tensor, there)}};
    const io::Packing* packing = checkpoint.packing(name);
    if (packing != nullptr) {
      row["packing"] = packing->name();
      row["stored_bytes"] = packing->bytes();
    }
    stored_bytes += packing != nullptr ? packing->bytes() : checkpoint.info(name).bytes();
    checkpoint.drop(name);
    parameters += tensor.numel();
    nonzeros += there;
    tensors.push_back(std::move(row));
  }
  json inspection = {{"kind", "model"},
                     {"parameters", parameters},
                     {"nonzeros", nonzeros},
                     {"sparsity", parameters ? 1 - double(nonzeros) / double(parameters) : 0.0},
                     {"bytes", checkpoint.bytes()}};
  if (stored_bytes != checkpoint.bytes()) inspection["stored_bytes"] = stored_bytes;
  if (const auto architecture = model::supported_architecture(checkpoint)) {
    inspection["architecture"] = checkpoint.config().value("model_type", "");
    inspection["blocks"] = architecture->blocks;
    if (const int64_t removed = heads_removed(*architecture)) inspection["heads_removed"] = removed;
  }
  std::vector<std::string> below;
  for (const fs::path& directory : checkpoint.chain()) below.push_back(directory.string());
  below.erase(below.begin());
  if (!below.empty()) inspection["stands_on"] = below;
  if (const auto matrices = model::matrices_with_terms(checkpoint); !matrices.empty())
    inspection["matrices_with_terms"] = matrices;
  const fs::path stage = (fs::absolute(path) / "").lexically_normal().parent_path().parent_path();
  if (is_stage(stage)) inspection["made_by"] = stage.filename().string();
  inspection["tensors"] = std::move(tensors);
  return inspection;
}

}  // namespace espalier::inspect
