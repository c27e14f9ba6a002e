#include "stages/compress/pairs.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "pipeline/errors.h"
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

constexpr int64_t kChanged = 1, kMaskPreserving = 2;

}  // namespace

void require_comparable(const io::Checkpoint& base, const io::Checkpoint& fine_tuned) {
  for (const std::string& name : base.names()) {
    if (!fine_tuned.has(name))
      throw UserError(
          fmt::format("{}: {} of the base {} is missing; a residual can change and add tensors, "
                      "not remove them: "
                      "give the base that this model was made from (compress.base)",
                      fine_tuned.directory().string(), name, base.directory().string()));
    const auto &ours = base.info(name).shape, &theirs = fine_tuned.info(name).shape;
    if (ours != theirs)
      throw UserError(
          fmt::format("{}: {} is [{}], but [{}] in the base {}; a residual needs equal shapes: "
                      "give the base that "
                      "this model was made from (compress.base)",
                      fine_tuned.directory().string(), name, fmt::join(theirs, ", "),
                      fmt::join(ours, ", "), base.directory().string()));
  }
}

std::vector<MatrixPair> changed_matrices(const io::Checkpoint& base,
                                         const io::Checkpoint& fine_tuned,
                                         const comm::Communicator& group, Workers& workers) {
  std::vector<MatrixPair> pairs;
  for (const std::string& name : base.names()) {
    const auto& info = base.info(name);
    if (!is_matrix(info) || !is_matrix(fine_tuned.info(name))) continue;
    const Folded shape = folded(info.shape);
    pairs.push_back({name, info.shape, shape.rows, shape.columns, false});
  }
  std::vector<int64_t> facts(pairs.size(), 0);
  const int64_t ranks = group.size(), first = group.rank(), all = int64_t(pairs.size());
  workers.for_each(first < all ? (all - first - 1) / ranks + 1 : 0, [&](int64_t unit, int) {
    const int64_t i = first + unit * ranks;
    const Tensor ours = base.view(pairs[i].name), theirs = fine_tuned.view(pairs[i].name);
    if (differ(ours, theirs))
      facts[i] = kChanged | (zeros_survive(ours, theirs) ? kMaskPreserving : 0);
    base.drop(pairs[i].name);
    fine_tuned.drop(pairs[i].name);
  });
  group.all_reduce_max(std::span<int64_t>(facts));
  std::vector<MatrixPair> changed;
  for (size_t i = 0; i < pairs.size(); ++i) {
    if (facts[i] == 0) continue;
    pairs[i].mask_preserving = (facts[i] & kMaskPreserving) != 0;
    changed.push_back(std::move(pairs[i]));
  }
  return changed;
}

std::vector<WholeTensor> whole_tensors(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
                                       at::ScalarType vectors) {
  std::vector<WholeTensor> whole;
  for (const std::string& name : fine_tuned.names()) {
    const Tensor theirs = fine_tuned.view(name);
    if (!base.has(name)) {
      whole.push_back({name, theirs.clone()});
      continue;
    }
    if (is_matrix(base.info(name)) && is_matrix(fine_tuned.info(name))) continue;
    if (differ(base.view(name), theirs)) whole.push_back({name, as_vector(theirs, vectors, name)});
  }
  return whole;
}

}  // namespace espalier::compress
