#include "stages/prune/owl.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "stages/prune/kernels.h"

namespace espalier::prune {
namespace {

struct Rows {
  const NormedMatrix* matrix;
  int64_t first, count;
};

std::vector<Rows> rows_of(std::span<const NormedMatrix> matrices) {
  std::vector<Rows> all;
  for (const NormedMatrix& matrix : matrices)
    for (int64_t first = 0; first < matrix.weight.size(0); first += kTileRows)
      all.push_back({&matrix, first, std::min(kTileRows, matrix.weight.size(0) - first)});
  return all;
}

// fold(score) over the entries of each piece of rows, added in the order of the pieces.
template <class Value, class Fold>
Value sum_over_entries(const std::vector<Rows>& pieces, Workers& workers, const Fold& fold) {
  std::vector<Value> parts(pieces.size());
  std::vector<std::vector<float>> score(static_cast<size_t>(workers.count()));
  workers.for_each(static_cast<int64_t>(pieces.size()), [&](int64_t i, int worker) {
    const Rows& rows = pieces[i];
    const int64_t n = rows.matrix->weight.size(1);
    score[worker].resize(static_cast<size_t>(rows.count * n));
    scores(rows.matrix->weight.const_data_ptr<float>() + rows.first * n, rows.matrix->norms->data(),
           rows.count, n, score[worker].data());
    for (const float entry : score[worker]) parts[i] += fold(entry);
  });
  Value sum = 0;
  for (const Value part : parts) sum += part;
  return sum;
}

}  // namespace

double outlier_ratio(std::span<const NormedMatrix> matrices, double factor, Workers& workers) {
  const auto pieces = rows_of(matrices);
  double entries = 0;
  for (const NormedMatrix& matrix : matrices) entries += static_cast<double>(matrix.weight.numel());
  if (entries == 0) return 0;
  const double sum = sum_over_entries<double>(
      pieces, workers, [](float entry) { return static_cast<double>(entry); });
  const double bound = factor * (sum / entries);
  const auto outliers = sum_over_entries<int64_t>(
      pieces, workers, [&](float entry) { return int64_t{entry > bound}; });
  return static_cast<double>(outliers) / entries;
}

std::vector<double> owl_sparsities(std::span<const double> ratios,
                                   std::span<const int64_t> parameters, double sparsity,
                                   double span) {
  const auto [least, most] = std::minmax_element(ratios.begin(), ratios.end());
  std::vector<double> denser(ratios.size());
  double weighted = 0, total = 0;
  for (size_t b = 0; b < ratios.size(); ++b) {
    if (*most > *least) denser[b] = (ratios[b] - *least) / (*most - *least) * 2 * span;
    weighted += denser[b] * static_cast<double>(parameters[b]);
    total += static_cast<double>(parameters[b]);
  }
  const double mean = total > 0 ? weighted / total : 0;
  std::vector<double> sparsities;
  for (const double more : denser)
    sparsities.push_back(std::clamp(sparsity - more + mean, 0.0, std::nextafter(1.0, 0.0)));
  return sparsities;
}

}  // namespace espalier::prune
