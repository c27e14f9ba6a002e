#include "stages/prune/alps.h"

#include <gtest/gtest.h>

#include "problem.h"

namespace espalier::prune {
namespace {

AlpsInput input_of(const at::Tensor& gram, double damping = 0.01) {
  const ScaledGram scaled = scale_gram(gram.clone(), damping, "test");
  const auto [values, vectors] = at::linalg_eigh(scaled.gram);
  return {solver_gram(scaled), vectors.to(at::kFloat).contiguous(), values.to(at::kFloat)};
}

struct Plain {
  at::Tensor weight, pruned;
  int64_t iterations = 0;
};

// The publication's algorithm on the whole matrix in float64, each B by a linear solve.
Plain plain_alps(const at::Tensor& weight, const at::Tensor& gram, const Pattern& pattern,
                 const AlpsOptions& options) {
  const at::Tensor damped = with_damping(gram, 0.01), e = damped.diagonal().sqrt();
  const at::Tensor g = damped / e / e.unsqueeze(1), target = weight * e;
  const at::Tensor identity = at::eye(g.size(0), g.options());
  const auto keep = std::llround((1 - pattern.sparsity) * static_cast<double>(weight.numel()));
  const auto mask_of = [&](const at::Tensor& x) {
    return plain_mask(x.abs(), pattern, weight.numel() - keep);
  };
  double rho = options.rho;
  bool started = false;
  const at::Tensor first = mask_of(target);
  at::Tensor d = target.masked_fill(first, 0), v = at::zeros_like(d), last = first, b;
  Plain result;
  for (int64_t i = 1; i <= options.iterations; ++i) {
    result.iterations = i;
    b = at::linalg_solve(g + rho * identity, (target.mm(g) - v + rho * d).t()).t();
    const at::Tensor candidate = b + v / rho, mask = mask_of(candidate);
    d = candidate.masked_fill(mask, 0);
    v = v + rho * (b - d);
    if (i % 3 != 0) continue;
    const double changed =
        mask.logical_xor(last).sum().item<double>() / mask.logical_not().sum().item<double>();
    last = mask;
    if ((i >= 30 && changed < 0.0003) || (started && changed == 0)) break;
    if (changed > 0.005) {
      started = true;
      rho *= changed > 0.1 ? 1.3 : 1.2;
    } else if (started) {
      rho *= 1.1;
    } else {
      rho /= 5;
      if (changed > 0) d = target.masked_fill(first, 0), v = at::zeros_like(d), last = first;
    }
    rho = std::min(rho, 1e6);
  }
  result.pruned = mask_of(b);
  at::Tensor x = b.masked_fill(result.pruned, 0);
  at::Tensor residual = (target - x).mm(g).masked_fill(result.pruned, 0), direction = residual;
  for (int64_t step = 0; step < options.gradient_steps; ++step) {  // each row its own gradients
    const at::Tensor image = direction.mm(g).masked_fill(result.pruned, 0);
    const at::Tensor length = (residual * residual).sum(1, true);
    const at::Tensor move = length / (direction * image).sum(1, true).clamp_min(1e-300);
    x = x + move * direction;
    residual = residual - move * image;
    direction =
        residual + (residual * residual).sum(1, true) / length.clamp_min(1e-300) * direction;
  }
  result.weight = x / e;
  return result;
}

void expect_published(const Pattern& pattern, int64_t rows, int64_t columns,
                      const AlpsOptions& options) {
  Here here;
  const at::Tensor w = normals("w", rows, columns), gram = correlated_gram(columns);
  std::vector<MatrixTask> tasks = {task_of(w, pattern)};
  const auto reports = prune_alps(tasks, std::vector<AlpsInput>{input_of(gram)}, options, true,
                                  here.workers, here.group);
  const Plain plain = plain_alps(w.to(at::kDouble), gram, pattern, options);
  EXPECT_EQ(reports[0].iterations, plain.iterations);
  ASSERT_TRUE(tasks[0].mask.to(at::kBool).equal(plain.pruned));
  EXPECT_LT((tasks[0].weight - plain.weight).abs().max().item<double>(), 2e-4);
  EXPECT_EQ(tasks[0].weight.masked_select(plain.pruned).abs().max().item<float>(), 0);
}

TEST(Alps, GroupsAreThePublishedAlgorithm) {
  expect_published(kTwoOfFour, 150, 32, {});
  expect_published({2, 8, 0.75}, 40, 24, {});
}

TEST(Alps, UnstructuredIsThePublishedAlgorithmOverTheWholeMatrix) {
  expect_published(unstructured(0.6), 150, 32, {});
  expect_published(unstructured(0.35), 33, 21, {});
}

TEST(Alps, APenaltyTooLargeToMoveTheMaskIsLoweredAndTheIterationsStartAgain) {
  AlpsOptions options;
  options.rho = 300;
  expect_published(kTwoOfFour, 60, 32, options);
}

TEST(Alps, ErrsLessThanTheBestWeightsOnTheMagnitudeMask) {
  Here here;
  const at::Tensor w = normals("w", 60, 48), gram = correlated_gram(48);
  std::vector<MatrixTask> tasks = {task_of(w, kTwoOfFour)};
  prune_alps(tasks, std::vector<AlpsInput>{input_of(gram)}, {}, true, here.workers, here.group);
  const at::Tensor dense = w.to(at::kDouble), mask = plain_mask(dense.abs(), kTwoOfFour, 0);
  EXPECT_LT(squared_error(tasks[0].weight, dense, gram),
            0.9 * squared_error(plain_least_squares(dense, gram, mask), dense, gram));
}

TEST(Alps, InputsThatDoNotMixLeaveTheLargestWeightsAsTheyAre) {
  Here here;
  const at::Tensor w = normals("w", 20, 32), gram = at::eye(32, at::kDouble);
  std::vector<MatrixTask> tasks = {task_of(w, unstructured(0.5))};
  AlpsOptions options;
  options.iterations = 1;  // later ones let the dual pull pruned weights back
  prune_alps(tasks, std::vector<AlpsInput>{input_of(gram)}, options, true, here.workers,
             here.group);
  const at::Tensor mask = plain_mask(w.to(at::kDouble).abs(), unstructured(0.5), 320);
  EXPECT_TRUE(tasks[0].mask.to(at::kBool).equal(mask));
  EXPECT_LT((tasks[0].weight - w.masked_fill(mask, 0)).abs().max().item<float>(), 1e-5);
}

TEST(Alps, ZerosOfASparseModelAreNeverWrittenAndCount) {
  Here here;
  for (const Pattern& pattern : {unstructured(0.5), kTwoOfFour}) {
    at::Tensor w = normals("w", 64, 64);
    w.slice(1, 4, 7).zero_();  // three of a group
    w.slice(1, 40, 41).zero_();
    std::vector<MatrixTask> tasks = {task_of(w, pattern)};
    prune_alps(tasks, std::vector<AlpsInput>{input_of(correlated_gram(64))}, {}, true, here.workers,
               here.group);
    const at::Tensor zeros = w == 0;
    EXPECT_EQ(tasks[0].weight.masked_select(zeros).abs().max().item<float>(), 0);
    EXPECT_EQ(tasks[0].mask.masked_select(zeros).min().item<int>(), 1);
    const int64_t beyond = pattern.unstructured() ? 0 : 64;  // the third zero of that group
    EXPECT_EQ(tasks[0].mask.sum().item<int64_t>(), 64 * 32 + beyond);
  }
}

TEST(Alps, SparsityZeroChangesNothing) {
  Here here;
  const at::Tensor w = normals("w", 10, 32);
  std::vector<MatrixTask> tasks = {task_of(w, unstructured(0))};
  prune_alps(tasks, std::vector<AlpsInput>{input_of(correlated_gram(32))}, {}, true, here.workers,
             here.group);
  EXPECT_TRUE(tasks[0].weight.equal(w));
  EXPECT_EQ(tasks[0].mask.max().item<int>(), 0);
}

TEST(Refit, EndsAtTheLeastSquaresOfTheMask) {
  Here here;
  const at::Tensor w = normals("w", 150, 24), gram = correlated_gram(24);
  std::vector<MatrixTask> tasks = {task_of(w, kTwoOfFour)};
  prune_magnitude(tasks, true, here.workers, here.group);
  const std::vector<SolverGram> grams = {solver_gram(scale_gram(gram.clone(), 0.01, "test"))};
  refit(tasks, std::vector<at::Tensor>{w}, grams, 60, here.workers, here.group);
  const at::Tensor mask = tasks[0].mask.to(at::kBool);
  const at::Tensor exact = plain_least_squares(w.to(at::kDouble), with_damping(gram, 0.01), mask);
  EXPECT_LT((tasks[0].weight - exact).abs().max().item<double>(), 1e-4);
  EXPECT_EQ(tasks[0].weight.masked_select(mask).abs().max().item<float>(), 0);
}

TEST(Refit, EveryStepErrsLessAndZerosStayZero) {
  Here here;
  at::Tensor w = normals("w", 40, 48);
  w.slice(1, 8, 11).zero_();
  const at::Tensor gram = correlated_gram(48), damped = with_damping(gram, 0.01);
  const std::vector<SolverGram> grams = {solver_gram(scale_gram(gram.clone(), 0.01, "test"))};
  double before = 1e300;
  for (const int64_t steps : {1, 2, 4, 8}) {
    std::vector<MatrixTask> tasks = {task_of(w, unstructured(0.5))};
    prune_magnitude(tasks, true, here.workers, here.group);
    refit(tasks, std::vector<at::Tensor>{w}, grams, steps, here.workers, here.group);
    const double error = squared_error(tasks[0].weight, w.to(at::kDouble), damped);
    EXPECT_LT(error, before);
    EXPECT_EQ(tasks[0].weight.masked_select(w == 0).abs().max().item<float>(), 0);
    before = error;
  }
}

TEST(Refit, ADeadInputAndARowWithoutWeightsAreLeftInPeace) {
  Here here;
  at::Tensor w = normals("w", 4, 8), gram = correlated_gram(8);
  gram.select(0, 3).zero_(), gram.select(1, 3).zero_();
  w[2].zero_();
  for (const double damping : {0.0, 0.01}) {
    std::vector<MatrixTask> tasks = {task_of(w, kTwoOfFour)};
    prune_magnitude(tasks, true, here.workers, here.group);
    const std::vector<SolverGram> grams = {solver_gram(scale_gram(gram.clone(), damping, "test"))};
    refit(tasks, std::vector<at::Tensor>{w}, grams, 20, here.workers, here.group);
    EXPECT_TRUE(tasks[0].weight.isfinite().all().item<bool>());
    EXPECT_EQ(tasks[0].weight[2].abs().max().item<float>(), 0);
  }
}

}  // namespace
}  // namespace espalier::prune
