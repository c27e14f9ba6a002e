#include "stages/prune/scaled_gram.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <cmath>

#include "pipeline/errors.h"

namespace espalier::prune {

ScaledGram scale_gram(at::Tensor gram, double damping, const std::string& what) {
  const int64_t n = gram.size(0);
  double* g = gram.data_ptr<double>();
  double mean = 0;
  for (int64_t j = 0; j < n; ++j) mean += g[j * n + j] / static_cast<double>(n);
  std::vector<double> inverse(static_cast<size_t>(n));
  ScaledGram scaled{gram, {}, {}};
  for (int64_t j = 0; j < n; ++j) {
    double& diagonal = g[j * n + j];
    diagonal += damping * mean;
    if (diagonal == 0) diagonal = 1;
    inverse[j] = 1 / std::sqrt(diagonal);
    scaled.scale.push_back(static_cast<float>(std::sqrt(diagonal)));
    scaled.inverse.push_back(static_cast<float>(inverse[j]));
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double& entry = g[i * n + j];
      entry = i == j ? 1.0 : entry * inverse[i] * inverse[j];
      if (!std::isfinite(entry) || !std::isfinite(scaled.scale[i]))
        throw NumericalError(fmt::format(
            "{}: the Gram of its input is not finite at ({}, {}) of {} x {}; the model's hidden "
            "states overflow there: check the checkpoint, or use model.dtype=float32",
            what, i, j, n, n));
    }
  return scaled;
}

}  // namespace espalier::prune
