#include "stages/compress/allocation.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>

#include "pipeline/errors.h"

namespace espalier::compress {
namespace {

/// Below this share of the energy a singular value is rounding, not signal.
constexpr double kNegligible = 1e-14;
/// The share of the energy over which ln f is fitted.
constexpr double kFittedEnergy = 0.999;

int64_t cost_of(const std::vector<Spectrum>& matrices, const std::vector<int64_t>& ranks) {
  int64_t cost = 0;
  for (size_t i = 0; i < matrices.size(); ++i) cost += ranks[i] * matrices[i].cost;
  return cost;
}

/// Marks the matrices whose rank goes beyond what was computed.
void note_missing(const std::vector<Spectrum>& matrices, Allocation& allocation) {
  for (size_t i = 0; i < matrices.size(); ++i)
    if (allocation.truncation_ranks[i] > matrices[i].computed())
      allocation.wants_more.push_back(static_cast<int64_t>(i));
}

struct Candidate {
  double ratio;
  int64_t matrix;
  bool operator<(const Candidate& other) const {
    return ratio != other.ratio ? ratio < other.ratio : matrix > other.matrix;
  }
};

/// ln f(r) ~ intercept - slope r.
struct Fit {
  double intercept = 0, slope = 0;
  bool usable = false;  ///< false: nothing to keep (no energy)
};

Fit fit_decay(const Spectrum& spectrum, bool& wants_more) {
  std::vector<double> logarithms;
  double left = spectrum.energy;
  for (int64_t r = 0;; ++r) {
    const bool inside = left > (1 - kFittedEnergy) * spectrum.energy && left > 0;
    if (inside || (logarithms.size() == 1 && left > 0)) logarithms.push_back(std::log(left));
    if (!inside) break;
    if (r == spectrum.computed()) {
      wants_more = !spectrum.complete();
      break;
    }
    left = std::max(0.0, left - spectrum.squares[r]);
  }
  if (logarithms.empty()) return {};
  // A single point (everything in one value, nothing left) falls as fast as the fit range allows.
  if (logarithms.size() == 1) return {logarithms[0], -std::log(1 - kFittedEnergy), true};
  const double count = static_cast<double>(logarithms.size());
  double mean = 0, product = 0, square = 0;
  for (double y : logarithms) mean += y / count;
  const double middle = (count - 1) / 2;
  for (size_t r = 0; r < logarithms.size(); ++r) {
    product += (double(r) - middle) * (logarithms[r] - mean);
    square += (double(r) - middle) * (double(r) - middle);
  }
  const double slope = -product / square;
  return {mean + slope * middle, slope, slope > 0};
}

/// The relaxed ranks r_i(lambda) at the largest total that fits.
std::vector<double> relaxed_ranks(const std::vector<Spectrum>& matrices,
                                  const std::vector<Fit>& fits, int64_t capacity) {
  const auto ranks_at = [&](double log_lambda) {
    std::vector<double> ranks(matrices.size(), 0);
    for (size_t i = 0; i < matrices.size(); ++i) {
      if (!fits[i].usable) continue;
      const double numerator = fits[i].intercept + std::log(fits[i].slope) - log_lambda -
                               std::log(double(matrices[i].cost));
      ranks[i] = std::clamp(numerator / fits[i].slope, 0.0, double(matrices[i].largest_rank));
    }
    return ranks;
  };
  const auto cost_at = [&](double log_lambda) {
    double cost = 0;
    const auto ranks = ranks_at(log_lambda);
    for (size_t i = 0; i < matrices.size(); ++i) cost += ranks[i] * double(matrices[i].cost);
    return cost;
  };
  double low = 0, high = 0;  // the bracket of ln lambda: everything at low, nothing at high
  for (size_t i = 0; i < matrices.size(); ++i) {
    if (!fits[i].usable) continue;
    const double top =
        fits[i].intercept + std::log(fits[i].slope) - std::log(double(matrices[i].cost));
    high = std::max(high, top);
    low = std::min(low, top - fits[i].slope * double(matrices[i].largest_rank));
  }
  if (cost_at(low) <= double(capacity)) return ranks_at(low);
  for (int step = 0; step < 200; ++step) {
    const double middle = (low + high) / 2;
    (cost_at(middle) > double(capacity) ? low : high) = middle;
  }
  return ranks_at(high);
}

}  // namespace

double lost_energy(const Spectrum& spectrum, int64_t truncation_rank) {
  double left = spectrum.energy;
  for (int64_t r = 0; r < truncation_rank; ++r) left -= spectrum.squares[r];
  return std::max(0.0, left);
}

Allocation allocate_uniform(const std::vector<Spectrum>& matrices, int64_t capacity) {
  return allocate_uniform(matrices, capacity, std::numeric_limits<int64_t>::max());
}

Allocation allocate_uniform(const std::vector<Spectrum>& matrices, int64_t capacity, int64_t rank) {
  const auto ranks_at = [&](int64_t common) {
    std::vector<int64_t> ranks;
    for (const auto& matrix : matrices) ranks.push_back(std::min(common, matrix.largest_rank));
    return ranks;
  };
  int64_t low = 0, high = 0;
  for (const auto& matrix : matrices) high = std::max(high, matrix.largest_rank);
  high = std::min(high, rank);
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (cost_of(matrices, ranks_at(middle)) <= capacity)
      low = middle;
    else
      high = middle - 1;
  }
  Allocation allocation;
  allocation.truncation_ranks = ranks_at(low);
  allocation.used = cost_of(matrices, allocation.truncation_ranks);
  note_missing(matrices, allocation);
  return allocation;
}

Allocation allocate_greedy(const std::vector<Spectrum>& matrices, int64_t capacity,
                           std::vector<int64_t> start) {
  Allocation allocation;
  start.resize(matrices.size(), 0);
  allocation.truncation_ranks = std::move(start);
  auto& ranks = allocation.truncation_ranks;
  allocation.used = cost_of(matrices, ranks);
  std::priority_queue<Candidate> heap;
  // A value that was not computed yet is at most the last one that was.
  const auto offer = [&](int64_t i) {
    const auto& matrix = matrices[i];
    if (ranks[i] >= matrix.largest_rank) return;
    const int64_t known = std::min(ranks[i], matrix.computed() - 1);
    const double square = known < 0 ? matrix.energy : matrix.squares[known];
    if (square > kNegligible * matrix.energy) heap.push({square / double(matrix.cost), i});
  };
  for (size_t i = 0; i < matrices.size(); ++i) offer(static_cast<int64_t>(i));
  bool broken = false;
  while (!heap.empty()) {
    const auto [ratio, i] = heap.top();
    heap.pop();
    const auto& matrix = matrices[i];
    if (allocation.used + matrix.cost > capacity) {
      if (!broken) allocation.gap = ratio * double(capacity - allocation.used);
      broken = true;
      continue;
    }
    if (ranks[i] >= matrix.computed()) {
      allocation.wants_more.push_back(i);
      continue;
    }
    if (broken) allocation.gap -= matrix.squares[ranks[i]];
    allocation.used += matrix.cost;
    ++ranks[i];
    offer(i);
  }
  allocation.gap = std::max(0.0, allocation.gap);
  return allocation;
}

Allocation allocate_paper(const std::vector<Spectrum>& matrices, int64_t capacity, double prior) {
  std::vector<Fit> fits;
  std::vector<int64_t> unfinished;
  double total_cost = 0;
  for (size_t i = 0; i < matrices.size(); ++i) {
    bool wants_more = false;
    fits.push_back(fit_decay(matrices[i], wants_more));
    if (wants_more) unfinished.push_back(static_cast<int64_t>(i));
    total_cost += double(matrices[i].cost);
  }
  if (!unfinished.empty()) {
    Allocation allocation;
    allocation.truncation_ranks.assign(matrices.size(), 0);
    allocation.wants_more = std::move(unfinished);
    return allocation;
  }
  const double average = total_cost > 0 ? double(capacity) / total_cost : 0;
  const auto relaxed = relaxed_ranks(matrices, fits, capacity);
  std::vector<int64_t> ranks;
  for (size_t i = 0; i < matrices.size(); ++i) {
    const double mixed = (1 - prior) * relaxed[i] + prior * average;
    ranks.push_back(std::min(matrices[i].largest_rank, static_cast<int64_t>(mixed)));
  }
  Allocation allocation = allocate_greedy(matrices, capacity, ranks);
  allocation.gap = 0;
  allocation.wants_more.clear();
  for (size_t i = 0; i < matrices.size(); ++i)
    if (!matrices[i].complete() && allocation.truncation_ranks[i] >= matrices[i].computed())
      allocation.wants_more.push_back(static_cast<int64_t>(i));
  return allocation;
}

Allocation allocate(const std::string& method, const std::vector<Spectrum>& matrices,
                    int64_t capacity, double prior) {
  if (method == "uniform") return allocate_uniform(matrices, capacity);
  if (method == "paper") return allocate_paper(matrices, capacity, prior);
  if (method == "greedy") return allocate_greedy(matrices, capacity);
  throw DefectError(fmt::format("no allocation is named '{}'", method));
}

}  // namespace espalier::compress
