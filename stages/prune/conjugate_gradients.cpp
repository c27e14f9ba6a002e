#include "stages/prune/conjugate_gradients.h"

#include <ATen/ATen.h>

#include "pipeline/linalg/product.h"
#include "stages/prune/kernels.h"
#include "stages/prune/solver_kernels.h"
#include "stages/prune/tile_access.h"

namespace espalier::prune {
namespace {

// One row's step: x moves along the direction, whose image under G is given; then the direction
// turns. A row that has converged (or has no weight left) stays.
void step_row(float* x, float* residual, float* direction, float* image, const uint8_t* pruned,
              int64_t n) {
  const float length = dot(residual, residual, n), curvature = dot(direction, image, n);
  if (!(length > 0) || !(curvature > 0)) return;
  const float step = length / curvature;
  apply_mask(image, pruned, n);
  add_scaled(step, direction, n, x);
  add_scaled(-step, image, n, residual);
  scale_and_add(dot(residual, residual, n) / length, residual, n, direction);
}

}  // namespace

SolverGram solver_gram(const ScaledGram& scaled) {
  return {scaled.gram.to(at::kFloat), scaled.scale, scaled.inverse};
}

void conjugate_gradients(const float* target, const uint8_t* pruned, int64_t rows,
                         const at::Tensor& gram, int64_t steps, float* x,
                         GradientWorkspace& workspace) {
  const int64_t n = gram.size(0), size = rows * n;
  for (auto* buffer : {&workspace.residual, &workspace.direction, &workspace.image})
    buffer->resize(static_cast<size_t>(size));
  float* residual = workspace.residual.data();
  float* image = workspace.image.data();
  const at::Tensor direction = at::from_blob(workspace.direction.data(), {rows, n}, at::kFloat);
  at::Tensor direction_image = at::from_blob(image, {rows, n}, at::kFloat);
  at::Tensor first = at::from_blob(residual, {rows, n}, at::kFloat);
  for (int64_t i = 0; i < size; ++i) workspace.direction[i] = target[i] - x[i];
  linalg::product_into(first, direction, gram);
  apply_mask(residual, pruned, size);
  workspace.direction.assign(residual, residual + size);
  for (int64_t step = 0; step < steps; ++step) {
    linalg::product_into(direction_image, direction, gram);
    for (int64_t row = 0; row < rows; ++row)
      step_row(x + row * n, residual + row * n, workspace.direction.data() + row * n,
               image + row * n, pruned + row * n, n);
  }
}

void refit(std::span<MatrixTask> tasks, std::span<const at::Tensor> dense,
           std::span<const SolverGram> grams, int64_t steps, Workers& workers,
           const comm::Communicator& group) {
  struct Buffers {
    std::vector<float> target, x;
    GradientWorkspace workspace;
  };
  std::vector<Buffers> buffers(static_cast<size_t>(workers.count()));
  const auto tiles = tiles_of_rank(tasks, group.rank(), group.size());
  for_each_tile(
      tasks, tiles, workers, [&](const TileView& view, const Tile& tile, int64_t, int worker) {
        Buffers& own = buffers[worker];
        const SolverGram& gram = grams[tasks[tile.task].statistic];
        const float* before = dense[tile.task].const_data_ptr<float>() + tile.first * view.columns;
        own.target.resize(view.size);
        own.x.resize(view.size);
        scale_columns(before, gram.scale.data(), view.rows, view.columns, own.target.data());
        scale_columns(view.weights, gram.scale.data(), view.rows, view.columns, own.x.data());
        conjugate_gradients(own.target.data(), view.pruned, view.rows, gram.gram, steps,
                            own.x.data(), own.workspace);
        scale_columns(own.x.data(), gram.inverse.data(), view.rows, view.columns, view.weights);
        apply_mask(view.weights, view.pruned, view.size);
        require_finite(tasks[tile.task], view, "after the refit");
      });
}

}  // namespace espalier::prune
