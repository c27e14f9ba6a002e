#include "pipeline/linalg/factor.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"

namespace espalier::linalg {
namespace {

using at::indexing::Slice;

constexpr int64_t kBlock = 128;
constexpr int kMostRaises = 4;

double* data_of(at::Tensor& t) { return t.data_ptr<double>(); }

// Checks the Gram, gives dead inputs a diagonal of 1, and returns the mean of the diagonal.
double prepare(at::Tensor& gram, const std::string& what, FactorReport& report) {
  const int64_t n = gram.size(0);
  double* h = data_of(gram);
  for (int64_t i = 0; i < n * n; ++i)
    if (!std::isfinite(h[i]))
      throw NumericalError(fmt::format(
          "{}: the Gram of its input holds {} at ({}, {}) of {} x {}; the model's hidden states "
          "overflow there: check the checkpoint, or use model.dtype=float32",
          what, h[i], i / n, i % n, n, n));
  double sum = 0;
  for (int64_t j = 0; j < n; ++j) {
    double& diagonal = h[j * n + j];
    if (diagonal == 0) {
      diagonal = 1;
      report.dead_inputs.push_back(j);
    }
    sum += diagonal;
  }
  return sum / static_cast<double>(n);
}

// H + shift I with rows and columns in reverse order.
at::Tensor reversed_and_damped(at::Tensor& gram, double shift) {
  const int64_t n = gram.size(0);
  at::Tensor reversed = at::empty({n, n}, gram.options());
  const double* h = data_of(gram);
  double* out = data_of(reversed);
  std::reverse_copy(h, h + n * n, out);
  for (int64_t j = 0; j < n; ++j) out[j * n + j] += shift;
  return reversed;
}

at::Tensor cholesky(at::Tensor& gram, double mean, double damping, const std::string& what,
                    FactorReport& report) {
  report.damping = damping;
  for (report.times_raised = 0;; ++report.times_raised, report.damping *= 10) {
    auto [lower, info] =
        at::linalg_cholesky_ex(reversed_and_damped(gram, report.damping * mean), false, false);
    // A not quite indefinite matrix may still end with a factor that is not finite.
    if (info.item<int>() == 0 && at::isfinite(lower.diagonal()).all().item<bool>()) return lower;
    if (report.times_raised == kMostRaises)
      throw NumericalError(fmt::format(
          "{}: the Gram of its input is not positive definite even with damping {} (raised from {} "
          "tenfold {} times); give more calibration samples or a larger prune.damping",
          what, report.damping, damping, kMostRaises));
  }
}

// The inverse of a lower triangular matrix: from the last block column to the first,
// X_ij = -(sum over j < k <= i of X_ik L_kj) X_jj, where X_ik is zero for k > i. LAPACK's own way
// (a triangular solve with the identity) does three times the work.
at::Tensor lower_inverse(const at::Tensor& lower) {
  const int64_t n = lower.size(0);
  at::Tensor inverse = at::zeros({n, n}, lower.options());
  const at::Tensor identity = at::eye(std::min(kBlock, n), lower.options());
  const int64_t blocks = (n + kBlock - 1) / kBlock;
  for (int64_t block = blocks - 1; block >= 0; --block) {
    const int64_t first = block * kBlock, width = std::min(kBlock, n - first), next = first + width;
    const auto columns = Slice(first, next);
    const at::Tensor diagonal =
        at::linalg_solve_triangular(lower.index({columns, columns}).contiguous(),
                                    identity.slice(0, 0, width).slice(1, 0, width), false);
    inverse.index_put_({columns, columns}, diagonal);
    if (next == n) continue;
    const at::Tensor panel = at::mm(lower.index({Slice(next), columns}), diagonal).neg_();
    for (int64_t row = next; row < n; row += kBlock) {
      const int64_t end = std::min(n, row + kBlock);
      at::Tensor out = inverse.index({Slice(row, end), columns});
      at::mm_out(out, inverse.index({Slice(row, end), Slice(next, end)}),
                 panel.slice(0, 0, end - next));
    }
  }
  return inverse;
}

// R[i, j] = X[n - 1 - i, n - 1 - j] for j >= i.
at::Tensor reversed_float(at::Tensor& inverse) {
  const int64_t n = inverse.size(0);
  at::Tensor factor = at::zeros({n, n}, at::kFloat);
  const double* x = data_of(inverse);
  float* r = factor.data_ptr<float>();
  for (int64_t i = 0; i < n; ++i) {
    const double* row = x + (n - 1 - i) * n;
    for (int64_t j = i; j < n; ++j) r[i * n + j] = static_cast<float>(row[n - 1 - j]);
  }
  return factor;
}

void check_diagonal(at::Tensor& factor, const std::string& what) {
  const int64_t n = factor.size(0);
  const float* r = factor.data_ptr<float>();
  for (int64_t j = 0; j < n; ++j)
    if (!(r[j * n + j] > 0) || !std::isfinite(r[j * n + j]))
      throw NumericalError(
          fmt::format("{}: the factor's diagonal is {} at input {}, outside float32's range; its "
                      "input is scaled beyond use: exclude the matrix (prune.exclude)",
                      what, r[j * n + j], j));
}

}  // namespace

at::Tensor inverse_factor(at::Tensor& gram, double damping, const std::string& what,
                          FactorReport& report) {
  const at::NoGradGuard no_gradients;
  report = {};
  const double mean = prepare(gram, what, report);
  const at::Tensor lower = cholesky(gram, mean, damping, what, report);
  at::Tensor inverse = lower_inverse(lower);
  at::Tensor factor = reversed_float(inverse);
  check_diagonal(factor, what);
  return factor;
}

}  // namespace espalier::linalg
