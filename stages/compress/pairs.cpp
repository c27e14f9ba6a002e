#include "stages/compress/pairs.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <filesystem>
#include <optional>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checkpoint_layout.h"
#include "pipeline/io/json.h"
#include "pipeline/model/added_terms.h"
#include "pipeline/model/heads.h"
#include "stages/compress/spectrum.h"

namespace espalier::compress {
namespace {

using at::Tensor;

bool is_matrix(const io::TensorInfo& info) {
  return info.shape.size() >= 2 && at::isFloatingType(info.dtype) && info.elements() > 0;
}

bool differ(const Tensor& base, const Tensor& fine_tuned) {
  if (base.scalar_type() == fine_tuned.scalar_type()) return !at::equal(base, fine_tuned);
  return !at::equal(base.to(at::kDouble), fine_tuned.to(at::kDouble));
}

Tensor as_vector(const Tensor& tensor, at::ScalarType vectors, const std::string& name) {
  if (!at::isFloatingType(tensor.scalar_type())) return tensor.clone();
  if (!at::isfinite(tensor).all().item<bool>())
    throw NumericalError(fmt::format(
        "{}: the fine-tuned tensor holds NaN or Inf; look at the run that wrote it", name));
  const Tensor narrow = tensor.to(vectors);
  return (at::isfinite(narrow).all().item<bool>() ? narrow : tensor.to(at::kFloat)).clone();
}

/// A tensor that differs in its first rows alone, or has more of them.
bool only_more_rows(const std::vector<int64_t>& base, const std::vector<int64_t>& fine_tuned) {
  return !base.empty() && base.size() == fine_tuned.size() && base[0] < fine_tuned[0] &&
         std::equal(base.begin() + 1, base.end(), fine_tuned.begin() + 1);
}

bool is_tied(const std::vector<TiedTensor>& tied, const std::string& name) {
  return std::any_of(tied.begin(), tied.end(), [&](const auto& one) { return one.name == name; });
}

bool changed(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
             const std::string& name) {
  return !base.has(name) || base.info(name).shape != fine_tuned.info(name).shape ||
         differ(base.view(name), fine_tuned.view(name));
}

/// Elements that tell most pairs of different tensors apart.
constexpr int64_t kGlance = 64;
constexpr int64_t kChanged = 1, kMaskPreserving = 2, kFillsZeros = 4;

/// So many zeros are a mask, not numbers that happen to be zero.
bool fills_zeros(const Tensor& base, const Tensor& fine_tuned) {
  return (fine_tuned == 0).logical_and_(base != 0).sum().item<int64_t>() * 16 >= base.numel();
}

std::optional<std::filesystem::path> heads_file(const io::Checkpoint& checkpoint) {
  return io::nearest_file(checkpoint.chain(), model::kHeadsFile);
}

/// Null: the model has all its heads.
nlohmann::json heads_of(const io::Checkpoint& checkpoint) {
  const auto file = heads_file(checkpoint);
  return file ? io::parse_json(io::read_file(*file, io::kMaxConfigBytes), file->string()) : nullptr;
}

constexpr const char* kSuchABase =
    "give as compress.base a model with the same heads, such as the model/ of the prune stage that "
    "removed them";

/// The shapes alone do not tell which heads are gone.
void refuse_other_heads(const io::Checkpoint& base, const io::Checkpoint& fine_tuned) {
  const nlohmann::json ours = heads_of(base), theirs = heads_of(fine_tuned);
  if (!ours.is_null() && !theirs.is_null() && ours != theirs)
    throw UserError(fmt::format("{}: has lost other attention heads than the base ({}); {}",
                                heads_file(fine_tuned)->string(), heads_file(base)->string(),
                                kSuchABase));
}

/// Why two shapes differ, where heads that are gone may be it; else empty.
std::string of_lost_heads(const io::Checkpoint& base, const io::Checkpoint& fine_tuned) {
  const auto ours = heads_file(base), theirs = heads_file(fine_tuned);
  if (ours.has_value() == theirs.has_value()) return "";
  return fmt::format("; attention heads of {} are gone ({}): {}", ours ? "the base" : "the model",
                     (ours ? ours : theirs)->string(), kSuchABase);
}

}  // namespace

void require_comparable(const io::Checkpoint& base, const io::Checkpoint& fine_tuned) {
  refuse_other_heads(base, fine_tuned);
  for (const std::string& name : base.names()) {
    if (model::is_term(name)) continue;  // an empty one; compress refuses a base with others
    if (!fine_tuned.has(name))
      throw UserError(
          fmt::format("{}: {} of the base {} is missing; a residual can change and add tensors, "
                      "not remove them: "
                      "give the base that this model was made from (compress.base)",
                      fine_tuned.directory().string(), name, base.directory().string()));
    const auto &ours = base.info(name).shape, &theirs = fine_tuned.info(name).shape;
    if (ours != theirs && !only_more_rows(ours, theirs))
      throw UserError(fmt::format(
          "{}: {} is [{}], but [{}] in the base {}; a residual needs equal shapes, or "
          "rows added behind the base's: give the base that this model was made from "
          "(compress.base){}",
          fine_tuned.directory().string(), name, fmt::join(theirs, ", "), fmt::join(ours, ", "),
          base.directory().string(), of_lost_heads(base, fine_tuned)));
  }
}

Tensor common_rows(const Tensor& fine_tuned, const std::vector<int64_t>& base_shape) {
  return base_shape.empty() ? fine_tuned : fine_tuned.narrow(0, 0, base_shape[0]);
}

std::vector<WholeTensor> added_rows(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
                                    const std::vector<TiedTensor>& tied) {
  std::vector<WholeTensor> added;
  for (const std::string& name : base.names()) {
    const int64_t rows = base.info(name).shape.empty() ? 0 : base.info(name).shape[0];
    if (!is_matrix(base.info(name)) || fine_tuned.info(name).shape[0] == rows ||
        is_tied(tied, name))
      continue;
    const Tensor theirs = fine_tuned.view(name);
    added.push_back({name, theirs.narrow(0, rows, theirs.size(0) - rows).clone()});
  }
  return added;
}

std::vector<TiedTensor> tied_tensors(const io::Checkpoint& base, const io::Checkpoint& fine_tuned) {
  std::vector<TiedTensor> tied;
  std::vector<std::pair<std::string, Tensor>> seen;  // and a glance at it
  for (const std::string& name : fine_tuned.names()) {
    if (!is_matrix(fine_tuned.info(name))) continue;
    const Tensor view = fine_tuned.view(name);
    const Tensor glance = view.reshape({-1}).slice(0, 0, kGlance).clone();
    const auto equal = std::find_if(seen.begin(), seen.end(), [&](const auto& other) {
      return fine_tuned.info(other.first).dtype == view.scalar_type() &&
             fine_tuned.info(other.first).shape == fine_tuned.info(name).shape &&
             at::equal(other.second, glance) && at::equal(fine_tuned.view(other.first), view);
    });
    if (equal == seen.end())
      seen.emplace_back(name, glance);
    else if (changed(base, fine_tuned, name))
      tied.push_back({name, equal->first});
  }
  return tied;
}

std::vector<MatrixPair> changed_matrices(const io::Checkpoint& base,
                                         const io::Checkpoint& fine_tuned,
                                         const std::vector<TiedTensor>& tied,
                                         const comm::Communicator& group, Workers& workers) {
  std::vector<MatrixPair> pairs;
  for (const std::string& name : base.names()) {
    const auto& info = base.info(name);
    if (!is_matrix(info) || !is_matrix(fine_tuned.info(name)) || is_tied(tied, name)) continue;
    const Folded shape = folded(info.shape);
    pairs.push_back({name, info.shape, shape.rows, shape.columns, false});
  }
  std::vector<int64_t> facts(pairs.size(), 0);
  const int64_t ranks = group.size(), first = group.rank(), all = int64_t(pairs.size());
  workers.for_each(first < all ? (all - first - 1) / ranks + 1 : 0, [&](int64_t unit, int) {
    const int64_t i = first + unit * ranks;
    const Tensor ours = base.view(pairs[i].name),
                 theirs = common_rows(fine_tuned.view(pairs[i].name), pairs[i].shape);
    if (differ(ours, theirs))
      facts[i] = kChanged | (zeros_survive(ours, theirs) ? kMaskPreserving : 0) |
                 (fills_zeros(ours, theirs) ? kFillsZeros : 0);
    base.drop(pairs[i].name);
    fine_tuned.drop(pairs[i].name);
  });
  group.all_reduce_max(std::span<int64_t>(facts));
  std::vector<MatrixPair> changed;
  for (size_t i = 0; i < pairs.size(); ++i) {
    if (facts[i] == 0) continue;
    pairs[i].mask_preserving = (facts[i] & kMaskPreserving) != 0;
    pairs[i].fills_zeros = (facts[i] & kFillsZeros) != 0;
    changed.push_back(std::move(pairs[i]));
  }
  return changed;
}

void require_zeros(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
                   const std::vector<MatrixPair>& pairs) {
  const auto filled = [](const MatrixPair& pair) { return pair.fills_zeros; };
  const auto first = std::find_if(pairs.begin(), pairs.end(), filled);
  if (first == pairs.end()) return;
  throw UserError(fmt::format(
      "{}: {} and {} more matrices are pruned, and the base {} has numbers in their zeros, which a "
      "decoded residual would fill; give as compress.base the pruned model before it was retrained "
      "(the prune stage's; where an adapter stands beside that, an export of it), or "
      "compress.zeros=fill",
      fine_tuned.directory().string(), first->name,
      std::count_if(pairs.begin(), pairs.end(), filled) - 1, base.directory().string()));
}

std::vector<WholeTensor> whole_tensors(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
                                       const std::vector<TiedTensor>& tied,
                                       at::ScalarType vectors) {
  std::vector<WholeTensor> whole;
  for (const std::string& name : fine_tuned.names()) {
    if (is_tied(tied, name)) continue;
    const Tensor theirs = fine_tuned.view(name);
    if (!base.has(name)) {
      whole.push_back({name, theirs.clone()});
      continue;
    }
    if (is_matrix(base.info(name)) && is_matrix(fine_tuned.info(name))) continue;
    if (changed(base, fine_tuned, name)) whole.push_back({name, as_vector(theirs, vectors, name)});
  }
  return whole;
}

}  // namespace espalier::compress
