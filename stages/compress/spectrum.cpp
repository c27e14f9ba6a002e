#include "stages/compress/spectrum.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>

#include "pipeline/errors.h"
#include "pipeline/linalg/one_thread.h"
#include "pipeline/linalg/svd.h"

namespace espalier::compress {
namespace {

constexpr double kNumericalRank = 1e-7;

}  // namespace

Folded folded(at::IntArrayRef shape) {
  Folded matrix{shape[0], 1};
  for (size_t i = 1; i < shape.size(); ++i) matrix.columns *= shape[i];
  return matrix;
}

at::Tensor difference(const at::Tensor& base, const at::Tensor& fine_tuned,
                      const std::string& name) {
  const Folded shape = folded(base.sizes());
  at::Tensor delta = fine_tuned.to(at::kDouble).reshape({shape.rows, shape.columns});
  delta = delta - base.reshape({shape.rows, shape.columns});
  if (!at::isfinite(delta).all().item<bool>())
    throw NumericalError(fmt::format(
        "{}: the base or the fine-tuned tensor holds NaN or Inf; a residual of it means "
        "nothing, look at the run that wrote it",
        name));
  return delta;
}

Decomposition decompose(const at::Tensor& delta, int64_t count, int64_t kept, uint64_t seed) {
  const linalg::OneThread one_thread;  // the sum's order is its threads'
  Decomposition result;
  result.largest_rank = std::min(delta.size(0), delta.size(1));
  result.energy = delta.square().sum().item<double>();
  count = std::min(count, result.largest_rank);
  if (result.energy == 0 || count == 0) {
    if (result.energy == 0) result.largest_rank = 0;
    result.values = at::zeros({0}, at::kDouble);
    result.u = at::zeros({delta.size(0), 0}, at::kFloat);
    result.v = at::zeros({delta.size(1), 0}, at::kFloat);
    return result;
  }
  const linalg::Svd svd = linalg::truncated_svd(delta, count, seed);
  const double floor = kNumericalRank * svd.s[0].item<double>();
  const int64_t above = (svd.s > floor).sum().item<int64_t>();
  if (above < count) result.largest_rank = above;
  kept = std::min(kept, above);
  result.values = svd.s.narrow(0, 0, above).contiguous();
  result.u = svd.u.narrow(1, 0, kept).to(at::kFloat).contiguous();
  result.v = svd.v.narrow(1, 0, kept).to(at::kFloat).contiguous();
  return result;
}

Spectrum spectrum_of(const Decomposition& decomposition, int64_t cost) {
  Spectrum spectrum;
  spectrum.energy = decomposition.energy;
  spectrum.largest_rank = decomposition.largest_rank;
  spectrum.cost = cost;
  const double* values = decomposition.values.data_ptr<double>();
  for (int64_t r = 0; r < decomposition.values.numel(); ++r)
    spectrum.squares.push_back(values[r] * values[r]);
  return spectrum;
}

}  // namespace espalier::compress
