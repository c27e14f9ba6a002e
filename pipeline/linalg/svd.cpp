#include "pipeline/linalg/svd.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/linalg/one_thread.h"
#include "pipeline/random.h"

namespace espalier::linalg {
namespace {

using at::Tensor;

/// What the squared matrix A^T A cannot tell from zero, relative to the largest singular value.
constexpr double kSquaredFloor = 1e-7;

Tensor checked(const Tensor& a) {
  if (a.dim() != 2) throw DefectError(fmt::format("svd: a tensor of {} dimensions", a.dim()));
  const Tensor matrix = a.to(at::kDouble).contiguous();
  if (!at::isfinite(matrix).all().item<bool>())
    throw NumericalError(
        fmt::format("a {} x {} matrix to decompose holds NaN or Inf; look at the step that made it",
                    a.size(0), a.size(1)));
  return matrix;
}

Tensor random_normal(int64_t rows, int64_t columns, uint64_t seed, std::string_view purpose) {
  Tensor x = at::empty({rows, columns}, at::kDouble);
  const CounterRandom random(seed, purpose);
  double* values = x.data_ptr<double>();
  for (int64_t i = 0; i < rows * columns; ++i) values[i] = random.normal(i);
  return x;
}

void fix_signs(Svd& svd) {
  const Tensor largest = svd.u.abs().argmax(0, /*keepdim=*/true);
  const Tensor sign = at::where(svd.u.gather(0, largest) < 0, -1.0, 1.0).to(at::kDouble);
  svd.u = (svd.u * sign).contiguous();
  svd.v = (svd.v * sign).contiguous();
}

Svd decompose(const Tensor& a) {
  auto [u, s, vh] = at::linalg_svd(a, /*full_matrices=*/false);
  return {u, s, vh.t()};
}

/// Rayleigh-Ritz on the subspace v [n, k], with A itself and not its square: u comes out
/// orthonormal and every s to full precision, zero singular values included.
Svd extract(const Tensor& a, const Tensor& v) {
  const auto [q, r] = at::linalg_qr(at::mm(a, v));
  const Svd small = decompose(r);
  return {at::mm(q, small.u), small.s, at::mm(v, small.v)};
}

bool accurate(const Tensor& a, const Svd& svd, double tolerance) {
  const double largest = svd.s[0].item<double>();
  const Tensor residual = at::mm(a.t(), svd.u) - svd.v * svd.s;
  const double worst = at::linalg_vector_norm(residual, 2, {0}).max().item<double>();
  const Tensor unit = at::eye(svd.v.size(1), at::kDouble);
  const double lost = (at::mm(svd.v.t(), svd.v) - unit).abs().max().item<double>();
  return worst <= tolerance * largest && lost <= 1e-10;
}

/// Krylov spaces hold at most one block of copies of a repeated singular value. A few directions
/// orthogonal to v, twice through A^T A, show a larger value that was passed over.
bool misses_a_larger_value(const Tensor& a, const Svd& svd, uint64_t seed, double tolerance) {
  const auto away = [&](const Tensor& x) { return x - at::mm(svd.v, at::mm(svd.v.t(), x)); };
  Tensor probe = away(random_normal(a.size(1), 8, seed, "svd.probe"));
  for (int step = 0; step < 2; ++step) {
    probe = away(at::mm(a.t(), at::mm(a, probe)));
    probe = away(std::get<0>(at::linalg_qr(probe)));
  }
  const double seen = at::linalg_vector_norm(at::mm(a, probe), 2, {0}).max().item<double>();
  return seen > svd.s[-1].item<double>() + tolerance * svd.s[0].item<double>();
}

/// Block Lanczos on A^T A with full orthogonalization (randomized block Krylov; Musco & Musco,
/// NeurIPS 2015).
class Krylov {
 public:
  Krylov(const Tensor& a, int64_t k, int64_t block, int64_t limit, uint64_t seed)
      : a_(a), k_(k), block_(block), limit_(limit) {
    basis_ = at::empty({a.size(1), limit}, at::kDouble);
    projected_ = at::zeros({limit, limit}, at::kDouble);
    const Tensor start = at::mm(a.t(), at::mm(a, random_normal(a.size(1), block, seed, "svd")));
    basis_.narrow(1, 0, block).copy_(std::get<0>(at::linalg_qr(start)));
  }

  /// The leading right subspace [n, k], or an undefined tensor when the space was used up first.
  Tensor run(double tolerance) {
    for (int64_t size = block_, next_check = k_ + block_; size <= limit_; size += block_) {
      const Tensor last = basis_.narrow(1, size - block_, block_);
      Tensor next = at::mm(a_.t(), at::mm(a_, last));
      const Tensor basis = basis_.narrow(1, 0, size);
      const Tensor overlap = at::mm(basis.t(), next);
      projected_.narrow(0, 0, size).narrow(1, size - block_, block_).copy_(overlap);
      next = next - at::mm(basis, overlap);
      auto [q, coupling] = at::linalg_qr(next - at::mm(basis, at::mm(basis.t(), next)));
      q = std::get<0>(at::linalg_qr(q - at::mm(basis, at::mm(basis.t(), q))));
      if (size >= next_check || size + block_ > limit_) {
        if (const Tensor v = ritz_vectors(size, coupling, tolerance); v.defined()) return v;
        next_check = size + std::max(block_, size / 5);
      }
      if (exhausted(size, coupling) || size + block_ > limit_) break;
      basis_.narrow(1, size, block_).copy_(q);
    }
    return {};
  }

 private:
  Tensor ritz_vectors(int64_t size, const Tensor& coupling, double tolerance) const {
    if (size < k_) return {};
    const auto [values, vectors] =
        at::linalg_eigh(projected_.narrow(0, 0, size).narrow(1, 0, size), "U");
    const Tensor s = values.narrow(0, size - k_, k_).clamp_min(0).sqrt();
    const Tensor y = vectors.narrow(1, size - k_, k_);
    const double largest = s[-1].item<double>();
    const Tensor lost =
        at::linalg_vector_norm(at::mm(coupling, y.narrow(0, size - block_, block_)), 2, {0});
    const Tensor residual = lost / s.clamp_min(kSquaredFloor * largest);
    if (!(residual.max().item<double>() <= 0.5 * tolerance * largest)) return {};
    return at::mm(basis_.narrow(1, 0, size), y);
  }

  /// The space is invariant: nothing new would come.
  bool exhausted(int64_t size, const Tensor& coupling) const {
    const double scale =
        projected_.narrow(0, 0, size).narrow(1, 0, size).abs().max().item<double>();
    return coupling.diagonal().abs().min().item<double>() <= 1e-14 * scale;
  }

  Tensor a_, basis_, projected_;
  int64_t k_, block_, limit_;
};

/// From the eigenvectors of A^T A: a third of the full decomposition's time.
Svd by_gram(const Tensor& a, int64_t k) {
  const auto [values, vectors] = at::linalg_eigh(at::mm(a.t(), a), "L");
  return extract(a, vectors.narrow(1, a.size(1) - k, k));
}

/// a [m, n] with m >= n.
Svd leading(const Tensor& a, int64_t k, uint64_t seed, double tolerance) {
  const int64_t n = a.size(1);
  const int64_t block = std::clamp<int64_t>((k / 4 + 7) / 8 * 8, 16, 64);
  // Past these shares A^T A and its eigenvectors cost less than the Krylov space (1536 x 576 on one
  // core: 85 ms whatever the spectrum, the full decomposition 150 ms, a space of 160 columns 45
  // ms).
  const int64_t limit = n * 3 / 10 / block * block;
  if (k <= n / 10 && limit >= k + block) {
    const Tensor v = Krylov(a, k, block, limit, seed).run(tolerance);
    if (v.defined()) {
      const Svd svd = extract(a, v);
      if (accurate(a, svd, tolerance) && !misses_a_larger_value(a, svd, seed, tolerance))
        return svd;
    }
  }
  if (const Svd svd = by_gram(a, k); accurate(a, svd, tolerance)) return svd;
  const Svd whole = decompose(a);
  return {whole.u.narrow(1, 0, k), whole.s.narrow(0, 0, k), whole.v.narrow(1, 0, k)};
}

}  // namespace

Svd truncated_svd(const Tensor& a, int64_t k, uint64_t seed, double tolerance) {
  const OneThread one_thread;
  const Tensor matrix = checked(a);
  const bool wide = matrix.size(0) < matrix.size(1);
  const int64_t smaller = std::min(matrix.size(0), matrix.size(1));
  if (k < 1 || k > smaller)
    throw DefectError(fmt::format("svd: {} singular values asked of a {} x {} matrix", k,
                                  matrix.size(0), matrix.size(1)));
  Svd svd = leading(wide ? matrix.t().contiguous() : matrix, k, seed, tolerance);
  if (wide) std::swap(svd.u, svd.v);
  fix_signs(svd);
  return svd;
}

Svd full_svd(const Tensor& a) {
  const OneThread one_thread;
  Svd svd = decompose(checked(a));
  fix_signs(svd);
  return svd;
}

Tensor polar_factor(const Tensor& x) {
  const OneThread one_thread;
  const Tensor matrix = checked(x);
  if (matrix.size(0) < matrix.size(1))
    throw DefectError(fmt::format("polar factor: a {} x {} matrix has more columns than rows",
                                  matrix.size(0), matrix.size(1)));
  const auto [values, vectors] = at::linalg_eigh(at::mm(matrix.t(), matrix), "L");
  // Well conditioned (cond <= 1e4): X (X^T X)^(-1/2), then one Newton-Schulz step for the last
  // bits.
  if (values[0].item<double>() > 1e-8 * values[-1].item<double>()) {
    const Tensor root = at::mm(vectors * values.rsqrt(), vectors.t());
    const Tensor y = at::mm(matrix, root);
    return 1.5 * y - 0.5 * at::mm(y, at::mm(y.t(), y));
  }
  const Svd svd = decompose(matrix);
  return at::mm(svd.u, svd.v.t());
}

}  // namespace espalier::linalg
