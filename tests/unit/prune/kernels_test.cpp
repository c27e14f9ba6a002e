#include "stages/prune/kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "pipeline/random.h"

namespace espalier::prune {
namespace {

using Floats = std::vector<float>;
using Bytes = std::vector<uint8_t>;

Floats normals(const std::string& purpose, int64_t count, float scale = 1) {
  const CounterRandom random(11, purpose);
  Floats values(count);
  for (int64_t i = 0; i < count; ++i) values[i] = scale * static_cast<float>(random.normal(i));
  return values;
}

// Few distinct values, so that ties are everywhere.
Floats coarse_scores(const std::string& purpose, int64_t count) {
  Floats values = normals(purpose, count);
  for (float& v : values) v = std::round(std::fabs(v) * 3) / 3;
  return values;
}

// Marks the `go` first of a stable sort of score[begin, begin + n).
void mark_by_sort(const Floats& score, int64_t begin, int64_t n, int64_t go, Bytes& pruned) {
  std::vector<int64_t> order(n);
  std::iota(order.begin(), order.end(), begin);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return score[a] < score[b]; });
  for (int64_t i = 0; i < go; ++i) pruned[order[i]] = 1;
}

Pattern keep_of(int64_t keep, int64_t group) {
  return {keep, group, 1.0 - static_cast<double>(keep) / static_cast<double>(group)};
}

TEST(PruneKernels, ScoresAreTheMagnitudeTimesTheNorm) {
  const int64_t rows = 3, columns = 37;
  const Floats w = normals("w", rows * columns), norm = coarse_scores("norm", columns);
  Floats wanda(w.size()), magnitude(w.size());
  scores(w.data(), norm.data(), rows, columns, wanda.data());
  scores(w.data(), nullptr, rows, columns, magnitude.data());
  for (int64_t i = 0; i < rows * columns; ++i) {
    EXPECT_EQ(wanda[i], std::fabs(w[i]) * norm[i % columns]);
    EXPECT_EQ(magnitude[i], std::fabs(w[i]));
  }
}

TEST(PruneKernels, RowsAreMarkedAsAStableSortMarksThem) {
  for (const int64_t columns : {1, 5, 16, 33, 100, 576, 1000})
    for (const bool ties : {false, true}) {
      const int64_t rows = 6;
      Floats score = ties ? coarse_scores("rows", rows * columns) : normals("rows", rows * columns);
      for (float& s : score) s = std::fabs(s);
      std::fill(score.begin(), score.begin() + columns, 0.25f);  // a row of nothing but ties
      for (const int64_t count : {int64_t{0}, int64_t{1}, columns / 2, columns - 1, columns}) {
        Bytes expected(score.size()), pruned(score.size(), 7);
        for (int64_t i = 0; i < rows; ++i)
          mark_by_sort(score, i * columns, columns, count, expected);
        mark_smallest_in_rows(score.data(), rows, columns, count, pruned.data());
        EXPECT_EQ(pruned, expected) << columns << " columns, " << count << " go, ties " << ties;
      }
    }
}

TEST(PruneKernels, RowsWithZerosSubnormalsAndTheLargestFloatAreMarkedExactly) {
  const Floats score = {3.4e38f, 0, 1e-45f, 0, 1e-40f, 1, 1e-45f, 2};
  Bytes pruned(8);
  mark_smallest_in_rows(score.data(), 1, 8, 3, pruned.data());
  EXPECT_EQ(pruned, (Bytes{0, 1, 1, 1, 0, 0, 0, 0}));
}

TEST(PruneKernels, GroupsAreMarkedAsAStableSortMarksThem) {
  for (const auto& [keep, group] : std::vector<std::pair<int64_t, int64_t>>{
           {2, 4}, {1, 4}, {3, 4}, {4, 8}, {2, 8}, {1, 2}, {3, 5}, {1, 64}, {63, 64}}) {
    const int64_t rows = 5, columns = group * 7;
    const Floats score = coarse_scores("groups", rows * columns);
    Bytes expected(score.size()), pruned(score.size(), 7);
    for (int64_t j = 0; j < rows * columns; j += group)
      mark_by_sort(score, j, group, group - keep, expected);
    mark_smallest_in_groups(score.data(), rows, columns, keep_of(keep, group), pruned.data());
    EXPECT_EQ(pruned, expected) << keep << ":" << group;
  }
}

TEST(PruneKernels, MaskedWeightsBecomeZeroAndTheOthersKeepTheirBits) {
  const Floats before = normals("mask", 77);
  Floats w = before;
  Bytes pruned(w.size());
  for (size_t i = 0; i < w.size(); ++i) pruned[i] = i % 3 == 0;
  apply_mask(w.data(), pruned.data(), 77);
  for (size_t i = 0; i < w.size(); ++i) EXPECT_EQ(w[i], i % 3 == 0 ? 0.0f : before[i]);
}

// An upper triangular factor with zeros below.
Floats upper_factor(int64_t n) {
  Floats r = normals("factor", n * n, 0.2f);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j <= i; ++j) r[i * n + j] = j == i ? 0.5f + std::fabs(r[i * n + j]) : 0;
  return r;
}

// Algorithm 1 of arXiv 2301.00774 inside one block, one row at a time, in double.
void plain_block(std::vector<double>& w, int64_t rows, int64_t columns, const Floats& r,
                 int64_t first, int64_t width, const Pattern& pattern, Bytes& pruned,
                 std::vector<double>& errors) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; ++c) {
      const int64_t j = first + c;
      if (!pattern.unstructured() && c % pattern.group == 0) {
        Floats score(pattern.group);
        Bytes marks(pattern.group);
        for (int64_t g = 0; g < pattern.group; ++g)
          score[g] = pruned[i * columns + j + g]
                         ? 0
                         : static_cast<float>(
                               std::pow(w[i * columns + j + g] / r[(j + g) * columns + j + g], 2));
        mark_by_sort(score, 0, pattern.group, pattern.group - pattern.keep, marks);
        for (int64_t g = 0; g < pattern.group; ++g) pruned[i * columns + j + g] |= marks[g];
      }
      double& weight = w[i * columns + j];
      const double e = pruned[i * columns + j] ? weight / r[j * columns + j] : 0;
      errors[i * width + c] = e;
      if (pruned[i * columns + j]) weight = 0;
      for (int64_t k = j + 1; k < first + width; ++k) w[i * columns + k] -= e * r[j * columns + k];
    }
}

void expect_block_is_plain(int64_t rows, int64_t columns, int64_t first, int64_t width,
                           const Pattern& pattern) {
  const Floats r = upper_factor(columns);
  Floats w = normals("weights", rows * columns), errors(rows * width, 7);
  Bytes pruned(w.size());
  if (pattern.unstructured())
    for (size_t i = 0; i < pruned.size(); ++i) pruned[i] = (i * 7) % 11 < 5;
  else  // one frozen zero a row
    for (int64_t i = 0; i < rows; ++i) pruned[i * columns + first + 1] = 1;
  std::vector<double> plain(w.begin(), w.end()), plain_errors(errors.size());
  Bytes plain_pruned = pruned;
  plain_block(plain, rows, columns, r, first, width, pattern, plain_pruned, plain_errors);
  sparsegpt_block(w.data(), rows, columns, r.data(), first, width, pattern, pruned.data(),
                  errors.data());
  EXPECT_EQ(pruned, plain_pruned);
  for (size_t i = 0; i < w.size(); ++i)
    EXPECT_NEAR(w[i], plain[i], 2e-5 * (1 + std::fabs(plain[i])));
  for (size_t i = 0; i < errors.size(); ++i)
    EXPECT_NEAR(errors[i], plain_errors[i], 2e-5 * (1 + std::fabs(plain_errors[i])));
}

TEST(PruneKernels, SparsegptBlockIsThePlainLoop) {
  expect_block_is_plain(8, 64, 32, 16, {});
  expect_block_is_plain(7, 50, 37, 13,
                        {});  // narrow last block, rows and columns that fill no vector
  expect_block_is_plain(1, 5, 0, 5, {});
  expect_block_is_plain(9, 72, 24, 40, keep_of(2, 4));
  expect_block_is_plain(5, 48, 24, 24, keep_of(2, 8));
  expect_block_is_plain(6, 30, 15, 15, keep_of(1, 3));
}

TEST(PruneKernels, SparsegptScoresAreZeroWherePrunedBefore) {
  const int64_t rows = 2, columns = 40, first = 3, width = 35;
  const Floats r = upper_factor(columns), w = normals("scores", rows * columns);
  Bytes pruned(w.size());
  pruned[columns + first + 2] = 1;
  Floats score(rows * width);
  sparsegpt_scores(w.data(), rows, columns, r.data(), first, width, pruned.data(), score.data());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; ++c) {
      const int64_t j = first + c;
      const float weight = w[i * columns + j], diagonal = r[j * columns + j];
      const float expected = (weight * weight) / (diagonal * diagonal);
      EXPECT_EQ(score[i * width + c], i == 1 && c == 2 ? 0 : expected);
    }
  mark_at_most(score.data(), rows, columns, first, width, score[5], pruned.data());
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      const bool inside = j >= first && j < first + width;
      EXPECT_EQ(pruned[i * columns + j], inside && score[i * width + j - first] <= score[5]);
    }
}

TEST(PruneKernels, SubtractColumnsTouchesOnlyItsColumns) {
  Floats w(3 * 50, 1.0f);
  const Floats update(3 * 37, 0.5f);
  subtract_columns(w.data(), 3, 50, 11, 37, update.data());
  for (int64_t i = 0; i < 150; ++i) {
    const int64_t j = i % 50;
    EXPECT_EQ(w[i], j >= 11 && j < 48 ? 0.5f : 1.0f);
  }
}

}  // namespace
}  // namespace espalier::prune
