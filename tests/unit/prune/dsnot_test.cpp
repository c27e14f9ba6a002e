#include "stages/prune/dsnot.h"

#include <gtest/gtest.h>

#include "problem.h"

namespace espalier::prune {
namespace {

using Doubles = std::vector<double>;

struct Row {
  Doubles weights, means, variances, norms;
  std::vector<uint8_t> pruned;
};

Row random_row(int64_t n, const Pattern& pattern, const std::string& name) {
  const at::Tensor w = normals(name + " w", 1, n), mean = 2 * normals(name + " mean", 1, n),
                   variance = normals(name + " variance", 1, n).square() + 0.01,
                   norm = (mean.square() + variance).sqrt();
  Row row;
  const auto copy = [&](const at::Tensor& t, Doubles& out) {
    out.assign(t.const_data_ptr<float>(), t.const_data_ptr<float>() + n);
  };
  copy(w, row.weights), copy(mean, row.means), copy(variance, row.variances), copy(norm, row.norms);
  const at::Tensor mask =
      plain_mask((w.abs() * norm).to(at::kDouble), pattern,
                 static_cast<int64_t>(static_cast<double>(n) * pattern.sparsity));
  for (int64_t j = 0; j < n; ++j) row.pruned.push_back(mask.data_ptr<bool>()[j]);
  return row;
}

double expected_error(const Row& row, const std::vector<uint8_t>& pruned) {
  double error = 0;
  for (size_t j = 0; j < pruned.size(); ++j)
    if (pruned[j]) error += row.weights[j] * row.means[j];
  return error;
}

// Both lists sorted once, then walked, as the authors' program does; the error summed anew each
// time.
std::vector<uint8_t> plain_refine(const Row& row, const Pattern& pattern, int64_t cycles,
                                  double threshold) {
  const auto n = static_cast<int64_t>(row.weights.size());
  std::vector<uint8_t> pruned = row.pruned;
  std::vector<int64_t> by_growth(n), by_score(n);
  std::iota(by_growth.begin(), by_growth.end(), 0);
  by_score = by_growth;
  const auto error_of = [&](int64_t j) { return row.weights[j] * row.means[j]; };
  std::stable_sort(by_growth.begin(), by_growth.end(), [&](int64_t a, int64_t b) {
    return error_of(a) / row.variances[a] > error_of(b) / row.variances[b];
  });
  std::stable_sort(by_score.begin(), by_score.end(), [&](int64_t a, int64_t b) {
    return std::abs(row.weights[a]) * row.norms[a] < std::abs(row.weights[b]) * row.norms[b];
  });
  std::vector<bool> used(n);
  for (int64_t cycle = 0; cycle < cycles; ++cycle) {
    const double error = expected_error(row, pruned);
    if (std::abs(error) <= threshold) break;
    if (error < 0) std::reverse(by_growth.begin(), by_growth.end());
    const auto grown = std::find_if(by_growth.begin(), by_growth.end(), [&](int64_t j) {
      return row.pruned[j] && !used[j] && error_of(j) * error > 0;
    });
    const auto gone = std::find_if(by_score.begin(), by_score.end(), [&](int64_t j) {
      if (row.pruned[j] || used[j] || grown == by_growth.end()) return false;
      return pattern.unstructured() ? error_of(j) * error < 0
                                    : j / pattern.group == *grown / pattern.group;
    });
    if (grown == by_growth.end() || gone == by_score.end()) break;
    std::vector<uint8_t> next = pruned;
    next[*grown] = 0, next[*gone] = 1;
    if (!pattern.unstructured() && expected_error(row, next) * error < 0) break;
    pruned = next;
    used[*grown] = used[*gone] = true;
    if (error < 0) std::reverse(by_growth.begin(), by_growth.end());
  }
  return pruned;
}

std::vector<float> floats(const Doubles& values) { return {values.begin(), values.end()}; }

int64_t refine(const Row& row, const Pattern& pattern, const RefineOptions& options,
               std::vector<uint8_t>& pruned) {
  const auto w = floats(row.weights), mean = floats(row.means), variance = floats(row.variances),
             norm = floats(row.norms);
  pruned = row.pruned;
  return refine_row(
      {w.data(), mean.data(), variance.data(), norm.data(), static_cast<int64_t>(w.size())},
      pattern, options, pruned.data());
}

TEST(Dsnot, RowsAreThePublishedProgramsWalkThroughSortedLists) {
  RefineOptions options;
  int64_t swapped = 0;
  for (const Pattern& pattern : {unstructured(0.6), kTwoOfFour, Pattern{2, 8, 0.75}})
    for (int i = 0; i < 30; ++i) {
      const Row row = random_row(64, pattern, std::to_string(i));
      for (const int64_t cycles : {1, 5, 50}) {
        options.cycles = cycles;
        std::vector<uint8_t> pruned;
        swapped += refine(row, pattern, options, pruned);
        EXPECT_EQ(pruned, plain_refine(row, pattern, cycles, options.threshold))
            << pattern.name() << " row " << i;
      }
    }
  EXPECT_GT(swapped, 300);
}

TEST(Dsnot, ErrorsShrinkAndTheNumberOfPrunedWeightsStays) {
  double before = 0, after = 0;
  for (int i = 0; i < 20; ++i) {
    const Row row = random_row(256, unstructured(0.5), std::to_string(i));
    std::vector<uint8_t> pruned;
    refine(row, unstructured(0.5), {}, pruned);
    before += std::abs(expected_error(row, row.pruned));
    after += std::abs(expected_error(row, pruned));
    EXPECT_EQ(std::accumulate(pruned.begin(), pruned.end(), 0), 128);
  }
  EXPECT_LT(after, before / 2);  // of all rows: one that overshoots may end further off
}

TEST(Dsnot, AGroupsErrorNeverChangesItsSign) {
  // Growing 0 takes 3 from an error of 3.5; pruning 1 gives 4 back with the other sign.
  const Row row{{3, -4, 0.5, 5}, {1, 1, 1, 1}, {1, 1, 1, 1}, {1, 1, 1, 1}, {1, 0, 1, 0}};
  std::vector<uint8_t> pruned;
  EXPECT_EQ(refine(row, kTwoOfFour, {}, pruned), 0);
  EXPECT_EQ(pruned, row.pruned);
  EXPECT_EQ(refine(row, unstructured(0.5), {}, pruned), 1);
}

TEST(Dsnot, RefinesTheMatricesNamedAndRestoresTheirDenseWeights) {
  Here here;
  const int64_t n = 32;
  const at::Tensor w = normals("w", 140, n), other = normals("other", 10, n);
  InputStatistics input;
  for (int64_t j = 0; j < n; ++j) {
    input.norms.push_back(1 + 0.1f * static_cast<float>(j % 5));
    input.means.push_back(j % 3 == 0 ? 2.0f : -0.5f);
    input.variances.push_back(1);
  }
  std::vector<MatrixTask> tasks = {task_of(w, kTwoOfFour), task_of(other, kTwoOfFour)};
  prune_magnitude(tasks, true, here.workers, here.group);
  const at::Tensor first = tasks[0].mask.clone(), kept = tasks[1].mask.clone();
  tasks[0].weight.mul_(2), tasks[1].weight.mul_(2);  // as if a method had corrected them
  const std::vector<uint8_t> refined = {1, 0};
  EXPECT_GT(refine_by_dsnot(tasks, refined, std::vector<at::Tensor>{w, other},
                            std::vector<InputStatistics>{input}, {}, here.workers, here.group),
            0);
  EXPECT_FALSE(tasks[0].mask.equal(first));
  EXPECT_TRUE(tasks[0].weight.equal(w.masked_fill(tasks[0].mask.to(at::kBool), 0)));
  EXPECT_TRUE(tasks[0].mask.reshape({-1, 4}).sum(1).eq(2).all().item<bool>());
  EXPECT_TRUE(tasks[1].mask.equal(kept));
  EXPECT_TRUE(tasks[1].weight.equal(2 * other.masked_fill(kept.to(at::kBool), 0)));
}

TEST(Dsnot, ZerosOfASparseModelAreNeverGrown) {
  Row row = random_row(64, unstructured(0.6), "zeros");
  for (size_t j = 0; j < 64; j += 3) row.weights[j] = 0, row.pruned[j] = 1;
  std::vector<uint8_t> pruned;
  EXPECT_GT(refine(row, unstructured(0.6), {}, pruned), 0);
  for (size_t j = 0; j < 64; j += 3) EXPECT_EQ(pruned[j], 1);
}

}  // namespace
}  // namespace espalier::prune
