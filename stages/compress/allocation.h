#pragma once
/// How many singular values each matrix keeps: minimise sum_i f_i(r_i) subject to
/// sum_i r_i cost_i <= capacity, where f_i(r) = ||Delta_i||^2 - sum of the r largest sigma^2
/// (arXiv 2305.18425, section 3; the cost of the paper is m_i + n_i, with a byte budget it is the
/// bytes that one more singular triplet takes in the file).

#include <cstdint>
#include <string>
#include <vector>

namespace espalier::compress {

/// What is known of one matrix.
struct Spectrum {
  double energy = 0;            ///< ||Delta||_F^2
  std::vector<double> squares;  ///< the leading sigma^2, descending, as many as were computed
  int64_t largest_rank = 0;     ///< R_i: min(m, n), or the numerical rank where it was seen
  int64_t cost = 0;             ///< of one singular triplet

  int64_t computed() const { return static_cast<int64_t>(squares.size()); }
  bool complete() const { return computed() >= largest_rank; }
};

/// f(r), never below 0. r <= computed().
double lost_energy(const Spectrum& spectrum, int64_t truncation_rank);

struct Allocation {
  std::vector<int64_t> truncation_ranks;
  int64_t used = 0;  ///< sum of rank * cost
  /// f(this) - min f <= gap (greedy; 0 for the others, which promise nothing).
  double gap = 0;
  /// Matrices of which more singular values must be computed before the answer is final; empty when
  /// it is.
  std::vector<int64_t> wants_more;
};

/// The largest common rank that fits, each matrix at most largest_rank.
Allocation allocate_uniform(const std::vector<Spectrum>& matrices, int64_t capacity);

/// The largest common rank that fits, and no more than `rank`.
Allocation allocate_uniform(const std::vector<Spectrum>& matrices, int64_t capacity, int64_t rank);

/// The paper: ln f_i(r) ~ ln a_i - b_i r fitted by least squares over the ranks that hold 99.9 % of
/// the energy (the paper is silent on the range), r_i(lambda) = clip(ln(a_i b_i / (lambda c_i)) /
/// b_i, 0, R_i), lambda by bisection; then r' = (1 - prior) r + prior r_avg with r_avg = capacity /
/// sum c_i, capped at R_i, rounded down, and what is left spent greedily.
Allocation allocate_paper(const std::vector<Spectrum>& matrices, int64_t capacity, double prior);

/// Singular values in order of sigma^2 / cost from a heap: sigma falls, so this is optimal up to
/// the last item. Smaller items that still fit after the first that does not are taken too; the gap
/// is ratio of that first item x the budget unused when it came, less what the later items gained.
/// `start` (default all 0) is an allocation to go on from; then the gap is not a certificate.
/// O(total rank * log matrices).
Allocation allocate_greedy(const std::vector<Spectrum>& matrices, int64_t capacity,
                           std::vector<int64_t> start = {});

/// By name: "uniform", "paper" or "greedy".
Allocation allocate(const std::string& method, const std::vector<Spectrum>& matrices,
                    int64_t capacity, double prior);

}  // namespace espalier::compress
