#include "stages/prune/matrix_pruning.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "pipeline/errors.h"
#include "pipeline/linalg/factor.h"
#include "problem.h"

namespace espalier::prune {
namespace {

using Floats = std::vector<float>;

// 1 for the `go` first of a stable sort of score's flat values in [begin, begin + n).
void mark_by_sort(const at::Tensor& score, int64_t begin, int64_t n, int64_t go, at::Tensor& mask) {
  const float* s = score.const_data_ptr<float>();
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), begin);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return s[a] < s[b]; });
  for (int64_t i = 0; i < go; ++i) mask.data_ptr<uint8_t>()[order[i]] = 1;
}

// Coarse values, so that ties are everywhere and cross tiles.
at::Tensor coarse(int64_t rows, int64_t columns) {
  return at::round(normals("coarse", rows, columns) * 4) / 4 + 0.0625;
}

TEST(Magnitude, TakesExactlyKOfTheMatrixTiesByFlatIndex) {
  Here here;
  const at::Tensor w = coarse(300, 36);
  for (const double sparsity : {0.0, 0.3, 0.5, 0.9999999}) {
    std::vector<MatrixTask> tasks = {
        task_of(w, unstructured(sparsity)),
        task_of(w.slice(0, 0, 100).contiguous(), unstructured(sparsity))};
    prune_magnitude(tasks, true, here.workers, here.group);
    for (const MatrixTask& task : tasks) {
      const at::Tensor before = w.slice(0, 0, task.weight.size(0));
      at::Tensor expected = at::zeros_like(task.mask);
      const int64_t n = task.weight.numel();
      mark_by_sort(before.abs().contiguous(), 0, n,
                   static_cast<int64_t>(std::floor(static_cast<double>(n) * sparsity)), expected);
      EXPECT_TRUE(task.mask.equal(expected)) << sparsity;
      EXPECT_TRUE(task.weight.equal(before.masked_fill(expected.to(at::kBool), 0)));
    }
  }
}

TEST(Magnitude, TwoOfFourTakesTheTwoSmallestOfEachGroup) {
  Here here;
  const at::Tensor w = coarse(130, 36);
  std::vector<MatrixTask> tasks = {task_of(w, kTwoOfFour)};
  prune_magnitude(tasks, true, here.workers, here.group);
  at::Tensor expected = at::zeros_like(tasks[0].mask);
  for (int64_t j = 0; j < w.numel(); j += 4) mark_by_sort(w.abs().contiguous(), j, 4, 2, expected);
  EXPECT_TRUE(tasks[0].mask.equal(expected));
}

TEST(Wanda, TakesTheSmallestScoresOfEveryRowTiesByColumn) {
  Here here;
  const at::Tensor w = coarse(130, 37), norm = normals("norm", 1, 37).abs().round();
  const Floats norms(norm.data_ptr<float>(), norm.data_ptr<float>() + 37);
  std::vector<MatrixTask> tasks = {task_of(w, unstructured(0.6), 1)};
  prune_wanda(tasks, std::vector<Floats>{{}, norms}, false, here.workers, here.group);
  at::Tensor expected = at::zeros_like(tasks[0].mask);
  for (int64_t i = 0; i < 130; ++i)
    mark_by_sort((w.abs() * norm).contiguous(), i * 37, 37, 22, expected);  // floor(22.2)
  EXPECT_TRUE(tasks[0].mask.equal(expected));
}

TEST(Wanda, TheVariantRemovesTheShareOfEachRowsScoresThatGivesTheSparsity) {
  Here here;
  // Rows of unequal spread: a row of equal scores loses fewer than one with a long tail.
  const at::Tensor w = normals("variant", 200, 64).pow(3);
  const at::Tensor norm = normals("norm", 1, 64).abs() + 0.5;
  const Floats norms(norm.data_ptr<float>(), norm.data_ptr<float>() + 64);
  for (const double sparsity : {0.3, 0.5, 0.6}) {
    std::vector<MatrixTask> tasks = {task_of(w, unstructured(sparsity))};
    prune_wanda_cumulative(tasks, std::vector<Floats>{norms}, true, here.workers, here.group);
    const at::Tensor score = (w.abs() * norm), order = std::get<0>(score.sort(1));
    const at::Tensor running = order.to(at::kDouble).cumsum(1);
    const auto counts_at = [&](double alpha) {
      return (running <= alpha * running.select(1, 63).unsqueeze(1)).sum(1);
    };
    double low = 0, high = 0.8, alpha = 0.4;
    for (;;) {
      const double now = counts_at(alpha).sum().item<double>() / (200 * 64);
      if (std::abs(now - sparsity) <= 0.001 || high - low < 0.001) break;
      (now > sparsity ? high : low) = alpha;
      alpha = (low + high) / 2;
    }
    const at::Tensor counts = counts_at(alpha);
    at::Tensor expected = at::zeros_like(tasks[0].mask);
    for (int64_t i = 0; i < 200; ++i)
      mark_by_sort(score.contiguous(), i * 64, 64, counts[i].item<int64_t>(), expected);
    EXPECT_TRUE(tasks[0].mask.equal(expected)) << sparsity;
    EXPECT_NEAR(tasks[0].mask.to(at::kFloat).mean().item<float>(), sparsity, 0.01);
    EXPECT_GT(counts.max().item<int64_t>(), counts.min().item<int64_t>());
  }
}

TEST(Zeros, OfASparseModelStayAndAreMarkedBeyondThePatternsCount) {
  Here here;
  at::Tensor w = normals("zeros", 8, 8);
  w.slice(1, 0, 3).zero_();  // three of each row's first group
  std::vector<MatrixTask> kept = {task_of(w, kTwoOfFour)}, counted = {task_of(w, kTwoOfFour)};
  prune_magnitude(kept, true, here.workers, here.group);
  prune_magnitude(counted, false, here.workers, here.group);
  EXPECT_EQ(kept[0].mask.sum().item<int64_t>(), 8 * 5);
  EXPECT_EQ(counted[0].mask.sum().item<int64_t>(), 8 * 4);
  EXPECT_TRUE(kept[0].weight.equal(counted[0].weight));
}

at::Tensor factor_for(int64_t n, const std::vector<int64_t>& dead = {}) {
  at::Tensor x = normals("tokens", 2 * n, n).to(at::kDouble);
  x = x + 0.5 * x.roll(1, 1);  // correlated inputs: corrections matter
  for (const int64_t column : dead) x.select(1, column).zero_();
  at::Tensor gram = at::mm(x.t(), x);
  linalg::FactorReport report;
  return linalg::inverse_factor(gram, 0.01, "test", report);
}

TEST(Zeros, OfASparseModelGoBeforeWeightsWhoseInputIsSilent) {
  Here here;
  // Each group of four: two weights that read a silent input, two zeros. Nothing more is to go.
  const at::Tensor w = at::tensor({5.f, 6.f, 0.f, 0.f}).repeat({3, 2});
  const at::Tensor expected = at::tensor({0, 0, 1, 1}, at::kByte).repeat({3, 2});
  const std::vector<Floats> norms = {{0, 0, 1, 1, 0, 0, 1, 1}};
  const std::vector<int64_t> silent = {0, 1, 4, 5};
  for (const Pattern& pattern : {kTwoOfFour, unstructured(0.5)}) {
    std::vector<MatrixTask> wanda = {task_of(w, pattern)}, sparsegpt = {task_of(w, pattern)};
    prune_wanda(wanda, norms, true, here.workers, here.group);
    EXPECT_TRUE(wanda[0].mask.equal(expected)) << pattern.name();
    EXPECT_TRUE(wanda[0].weight.equal(w)) << pattern.name();
    // The position floor(24 * 0.5) is the first beyond the zeros, and as published its ties go too.
    if (pattern.unstructured()) sparsegpt[0].pattern.sparsity = 0.49;
    prune_sparsegpt(sparsegpt, std::vector<at::Tensor>{factor_for(8, silent)},
                    std::vector<std::vector<int64_t>>{silent}, 8, true, here.workers, here.group);
    EXPECT_TRUE(sparsegpt[0].mask.equal(expected)) << pattern.name();
  }
}

struct Plain {
  at::Tensor weight, mask;
};

// Algorithm 1 as published: eager tensors, whole matrix, float32.
Plain plain_sparsegpt(at::Tensor w, const at::Tensor& r, const std::vector<int64_t>& dead,
                      const Pattern& pattern, int64_t block) {
  const int64_t rows = w.size(0), columns = w.size(1);
  w = w.clone();
  for (const int64_t column : dead) w.select(1, column).zero_();
  at::Tensor mask = at::zeros({rows, columns}, at::kByte);
  for (int64_t first = 0; first < columns; first += block) {
    const int64_t last = std::min(first + block, columns);
    at::Tensor w1 = w.slice(1, first, last), m1 = mask.slice(1, first, last);
    at::Tensor errors = at::zeros_like(w1);
    const at::Tensor r1 = r.slice(0, first, last).slice(1, first, last), diagonal = r1.diagonal();
    if (pattern.unstructured()) {
      const at::Tensor score = w1.pow(2) / diagonal.pow(2);
      const auto k = static_cast<int64_t>(static_cast<double>(score.numel()) * pattern.sparsity);
      const at::Tensor threshold = std::get<0>(score.flatten().sort())[k];
      m1.copy_(score <= threshold);
    }
    for (int64_t i = 0; i < last - first; ++i) {
      if (!pattern.unstructured() && i % pattern.group == 0) {
        const at::Tensor score = w1.slice(1, i, i + pattern.group).pow(2) /
                                 diagonal.slice(0, i, i + pattern.group).pow(2);
        const at::Tensor order = std::get<1>(score.sort(true, 1, false));
        m1.slice(1, i, i + pattern.group)
            .scatter_(1, order.slice(1, 0, pattern.group - pattern.keep), 1);
      }
      const at::Tensor column = w1.select(1, i);
      const at::Tensor q = column.masked_fill(m1.select(1, i).to(at::kBool), 0);
      const at::Tensor e = (column - q) / diagonal[i];
      w1.slice(1, i, last - first).sub_(at::outer(e, r1[i].slice(0, i, last - first)));
      w1.select(1, i).copy_(q);
      errors.select(1, i).copy_(e);
    }
    w.slice(1, last, columns).sub_(errors.mm(r.slice(0, first, last).slice(1, last, columns)));
  }
  return {w, mask};
}

void expect_published(const Pattern& pattern, int64_t columns, int64_t block,
                      const std::vector<int64_t>& dead) {
  Here here;
  const at::Tensor w = normals("w", 200, columns), r = factor_for(columns, dead);
  std::vector<MatrixTask> tasks = {task_of(w, pattern)};
  prune_sparsegpt(tasks, std::vector<at::Tensor>{r}, std::vector<std::vector<int64_t>>{dead}, block,
                  false, here.workers, here.group);
  const Plain plain = plain_sparsegpt(w, r, dead, pattern, block);
  ASSERT_TRUE(tasks[0].mask.equal(plain.mask));
  EXPECT_LT((tasks[0].weight - plain.weight).abs().max().item<float>(), 2e-5);
  EXPECT_EQ(tasks[0].weight.masked_select(tasks[0].mask.to(at::kBool)).abs().max().item<float>(),
            0);
}

TEST(Sparsegpt, UnstructuredIsThePublishedAlgorithm) {
  expect_published(unstructured(0.5), 96, 32, {});
  expect_published(unstructured(0.7), 75, 32, {});  // the last block is narrower
  expect_published(unstructured(0.5), 75, 128, {3, 40});
}

TEST(Sparsegpt, GroupsAreThePublishedAlgorithm) {
  expect_published(kTwoOfFour, 96, 32, {});
  expect_published(kTwoOfFour, 76, 32, {});
  expect_published(kTwoOfFour, 76, 32, {5, 6, 40});
  expect_published({2, 8, 0.75}, 72, 32, {});
}

TEST(Sparsegpt, MatricesThatAdvanceTogetherAreThoseSolvedAlone) {
  Here here;
  const at::Tensor a = normals("a", 200, 96), b = normals("b", 70, 40);
  const std::vector<at::Tensor> factors = {factor_for(40), factor_for(96)};
  const std::vector<std::vector<int64_t>> dead(2);
  std::vector<MatrixTask> both = {task_of(a, unstructured(0.5), 1), task_of(b, kTwoOfFour, 0)},
                          one = {both[0]}, other = {both[1]};
  one[0].weight = a.clone(), one[0].mask = both[0].mask.clone();
  other[0].weight = b.clone(), other[0].mask = both[1].mask.clone();
  for (auto* tasks : {&both, &one, &other})
    prune_sparsegpt(*tasks, factors, dead, 32, false, here.workers, here.group);
  EXPECT_TRUE(both[0].weight.equal(one[0].weight));
  EXPECT_TRUE(both[1].weight.equal(other[0].weight));
}

TEST(Sparsegpt, ZerosOfASparseModelAreNeverWritten) {
  Here here;
  for (const Pattern& pattern : {unstructured(0.5), kTwoOfFour}) {
    at::Tensor w = normals("w", 64, 64);
    w.slice(1, 4, 7).zero_();
    w.slice(1, 40, 41).zero_();
    std::vector<MatrixTask> tasks = {task_of(w, pattern)};
    prune_sparsegpt(tasks, std::vector<at::Tensor>{factor_for(64)},
                    std::vector<std::vector<int64_t>>(1), 32, true, here.workers, here.group);
    const at::Tensor zeros = w == 0;
    EXPECT_EQ(tasks[0].weight.masked_select(zeros).abs().max().item<float>(), 0);
    EXPECT_EQ(tasks[0].mask.masked_select(zeros).min().item<int>(), 1);
    EXPECT_NEAR(tasks[0].mask.to(at::kFloat).mean().item<float>(), 0.5, 0.05);
  }
}

TEST(Sparsegpt, SparsityZeroChangesNothing) {
  Here here;
  const at::Tensor w = normals("w", 10, 32);
  std::vector<MatrixTask> tasks = {task_of(w, unstructured(0))};
  prune_sparsegpt(tasks, std::vector<at::Tensor>{factor_for(32)},
                  std::vector<std::vector<int64_t>>(1), 32, true, here.workers, here.group);
  EXPECT_TRUE(tasks[0].weight.equal(w));
  EXPECT_EQ(tasks[0].mask.max().item<int>(), 0);
}

TEST(Pruning, EveryMatrixHasItsOwnPattern) {
  Here here;
  const at::Tensor w = normals("w", 140, 64);
  const Floats norms(64, 1.0f);
  const std::vector<Pattern> patterns = {
      unstructured(0.3), kTwoOfFour, unstructured(0.75), {2, 8, 0.75}};
  for (int method = 0; method < 3; ++method) {
    std::vector<MatrixTask> tasks;
    for (const Pattern& pattern : patterns) tasks.push_back(task_of(w, pattern));
    if (method == 0) prune_magnitude(tasks, true, here.workers, here.group);
    if (method == 1) prune_wanda(tasks, std::vector<Floats>{norms}, true, here.workers, here.group);
    if (method == 2)
      prune_sparsegpt(tasks, std::vector<at::Tensor>{factor_for(64)},
                      std::vector<std::vector<int64_t>>(1), 32, true, here.workers, here.group);
    for (const MatrixTask& task : tasks) {
      EXPECT_NEAR(task.mask.to(at::kFloat).mean().item<float>(), task.pattern.sparsity, 0.01);
      if (task.pattern.unstructured()) continue;
      const at::Tensor groups = task.mask.reshape({-1, task.pattern.group}).sum(1);
      EXPECT_TRUE(groups.eq(task.pattern.group - task.pattern.keep).all().item<bool>());
    }
  }
}

TEST(Pruning, AGroupThatDoesNotDivideTheInputsIsRefusedWithTheMatrixName) {
  Here here;
  std::vector<MatrixTask> tasks = {task_of(normals("w", 4, 30), kTwoOfFour)};
  try {
    prune_magnitude(tasks, true, here.workers, here.group);
    FAIL();
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("block 0 q_proj: pattern 2:4"), std::string::npos);
  }
}

TEST(Pruning, AWeightThatIsNotFiniteIsRefusedWithTheMatrixName) {
  Here here;
  for (const float bad : {std::nanf(""), -std::numeric_limits<float>::infinity()})
    for (const int64_t column : {0, 29}) {
      at::Tensor w = normals("w", 4, 30);
      w[3][column] = bad;
      std::vector<MatrixTask> tasks = {task_of(w, unstructured(0.5))};
      EXPECT_THROW(prune_magnitude(tasks, true, here.workers, here.group), NumericalError);
    }
}

TEST(Tiles, EveryRowBelongsToExactlyOneRank) {
  std::vector<MatrixTask> tasks = {task_of(at::zeros({300, 2}), kTwoOfFour),
                                   task_of(at::zeros({128, 2}), kTwoOfFour)};
  std::vector<int> owners(428);
  for (int rank = 0; rank < 3; ++rank)
    for (const Tile& tile : tiles_of_rank(tasks, rank, 3))
      for (int64_t i = 0; i < tile.rows; ++i) ++owners[tile.task * 300 + tile.first + i];
  EXPECT_EQ(std::count(owners.begin(), owners.end(), 1), 428);
  EXPECT_EQ(tiles_of_rank(tasks, 0, 3).size(), 2u);  // tiles 0 and 3
}

}  // namespace
}  // namespace espalier::prune
