#include "stages/compress/masked.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "pipeline/linalg/one_thread.h"
#include "pipeline/linalg/product.h"
#include "pipeline/random.h"

namespace espalier::compress {
namespace {

using at::Tensor;

constexpr int kStepsOfAPilot = 8;
/// A completion ends when a step lowers the loss by less than this share of it.
constexpr double kImprovement = 0.005;
constexpr int kFewestSteps = 8;
/// One entry of so many.
constexpr int64_t kFewestZeros = 16;
/// Of the energy: less is rounding.
constexpr double kNothing = 1e-12;

Tensor random_signs(int64_t rows, int64_t columns, uint64_t seed) {
  Tensor x = at::empty({rows, columns}, at::kFloat);
  const CounterRandom random(seed, "compress.masked");
  float* values = x.data_ptr<float>();
  for (int64_t i = 0; i < x.numel(); ++i) values[i] = random.bits(i) & 1 ? 1.0f : -1.0f;
  return x;
}

/// L = Q V at each step, with X of the momentum's point.
class Completion {
 public:
  Completion(const Tensor& delta, const Tensor& mask, int64_t rank, uint64_t seed)
      : delta_(delta.to(at::kFloat)), mask_(mask), x_(delta_.clone()) {
    v_ = linalg::product(random_signs(rank, delta_.size(0), seed), delta_, at::kFloat);
  }

  void step() {
    q_ = std::get<0>(at::linalg_qr(linalg::product(x_, v_.t(), at::kFloat), "reduced"));
    v_ = linalg::product(q_.t(), x_, at::kFloat);
    Tensor low_rank = linalg::product(q_, v_, at::kFloat);
    const double before = lost_;
    lost_ = (delta_ - low_rank).mul_(mask_).square_().sum(at::kDouble).item<double>();
    if (lost_ > before) momentum_ = 0;
    const double weight = previous_.defined() ? momentum_ / (momentum_ + 3.0) : 0.0;
    ++momentum_;
    x_ = weight > 0 ? low_rank + weight * (low_rank - previous_) : low_rank;
    x_ = at::where(mask_, delta_, x_);
    previous_ = low_rank;
  }

  double lost() const { return lost_; }

  MaskedFactors factors() const {
    const auto [right, r] = at::linalg_qr(v_.t().to(at::kDouble));
    const auto [u, s, vh] = at::linalg_svd(r.t(), /*full_matrices=*/false);
    return {at::mm(q_.to(at::kDouble), u).to(at::kFloat).contiguous(), s.contiguous(),
            at::mm(right, vh.t()).to(at::kFloat).contiguous(), lost_};
  }

 private:
  Tensor delta_, mask_, x_, q_, v_, previous_;
  double lost_ = std::numeric_limits<double>::infinity();
  double momentum_ = 0;
};

}  // namespace

int64_t largest_masked_rank(int64_t rows, int64_t columns, int64_t entries) {
  const int64_t smaller = std::min(rows, columns);
  int64_t rank = 1;
  while (rank < smaller && (rank + 1) * (rows + columns - rank - 1) < entries) ++rank;
  return rank;
}

bool worth_completing(const Tensor& base) {
  return (base == 0).sum().item<int64_t>() * kFewestZeros >= base.numel();
}

MaskedFactors complete(const Tensor& delta, const Tensor& mask, int64_t truncation_rank,
                       int most_steps, uint64_t seed) {
  const linalg::OneThread one_thread;
  Completion completion(delta, mask, truncation_rank, seed);
  for (int step = 0; step < most_steps; ++step) {
    const double before = completion.lost();
    completion.step();
    const double fell = before - completion.lost();
    if (step >= kFewestSteps && fell >= 0 && fell < kImprovement * before) break;
  }
  return completion.factors();
}

Decomposition masked_decomposition(const Tensor& delta, const Tensor& mask, double average_rank,
                                   uint64_t seed) {
  const linalg::OneThread one_thread;
  Decomposition result;
  result.energy = delta.square().sum().item<double>();
  result.largest_rank =
      largest_masked_rank(delta.size(0), delta.size(1), mask.sum().item<int64_t>());
  std::vector<std::pair<int64_t, double>> points = {{0, result.energy}};  // (r, f(r))
  for (const double share : {0.5, 1.5}) {
    const int64_t wanted = std::max<int64_t>(std::llround(share * average_rank), 1);
    const int64_t rank = std::min(wanted, result.largest_rank);
    if (rank <= points.back().first) break;
    Completion completion(delta, mask, rank, seed);
    for (int step = 0; step < kStepsOfAPilot; ++step) completion.step();
    points.emplace_back(
        rank, std::clamp(completion.lost(), kNothing * result.energy, points.back().second));
  }
  result.values = at::empty({result.largest_rank}, at::kDouble);
  double left = result.energy, gain = result.energy;
  size_t piece = 0;
  for (int64_t r = 0; r < result.largest_rank; ++r) {
    if (piece + 2 < points.size() && r >= points[piece + 1].first) ++piece;
    const auto& [from, above] = points[piece];
    const auto& [to, below] = points[piece + 1];
    const double fall = std::log(above / below) / double(to - from);
    // What one rank more gains never grows: the allocations build on it.
    gain = std::min(gain, left * -std::expm1(-fall));
    left -= gain;
    result.values.data_ptr<double>()[r] = std::sqrt(gain);
  }
  result.u = at::zeros({delta.size(0), 0}, at::kFloat);
  result.v = at::zeros({delta.size(1), 0}, at::kFloat);
  return result;
}

}  // namespace espalier::compress
