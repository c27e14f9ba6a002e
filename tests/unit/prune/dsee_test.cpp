#include "stages/prune/dsee.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"
#include "stages/prune/method.h"
#include "tests/unit/prune/judged_model.h"

namespace espalier::prune {
namespace {

/// W, and dW = scale up down + S, as plain doubles.
std::vector<double> change_of(const MatrixTask& task, const Terms& terms) {
  const int64_t rows = task.weight.size(0), columns = task.weight.size(1);
  std::vector<double> sum(rows * columns);
  if (!terms) return sum;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t k = 0; k < terms->down.size(0); ++k)
        sum[i * columns + j] +=
            terms->scale * terms->up[i][k].item<double>() * terms->down[k][j].item<double>();
  for (int64_t p = 0; p < terms->positions.numel(); ++p)
    sum[terms->positions[p].item<int64_t>()] += terms->values[p].item<double>();
  return sum;
}

using Masks = std::vector<std::vector<std::vector<bool>>>;  // [unit][matrix][position]

/// Sorts every weight of a group by (quantity, unit, matrix, position) and takes the first ones.
Masks plain_masks(const DseeRule& rule) {
  struct Weight {
    bool there;  // zeros go first
    double quantity;
    int64_t unit, matrix, position;
  };
  std::vector<Weight> groups[2];
  Masks masks;
  for (int64_t unit = 0; unit < kUnits; ++unit) {
    const JudgedMatrices judged = judged_unit(unit);
    masks.emplace_back();
    for (size_t t = 0; t < judged.tasks.size(); ++t) {
      const std::vector<double> change = change_of(judged.tasks[t], judged.terms[t]);
      const float* weight = judged.tasks[t].weight.const_data_ptr<float>();
      const bool with_terms = judged.terms[t].has_value();
      masks.back().emplace_back(change.size());
      for (size_t i = 0; i < change.size(); ++i) {
        const double delta = std::abs(change[i]), merged = std::abs(weight[i] + change[i]),
                     magnitude = std::abs(weight[i]);
        const double quantity = !with_terms || rule.criterion == Criterion::magnitude ? magnitude
                                : rule.criterion == Criterion::delta                  ? delta
                                                                                      : merged;
        groups[with_terms ? 0 : 1].push_back({!rule.keep_zeros || weight[i] != 0, quantity, unit,
                                              static_cast<int64_t>(t), static_cast<int64_t>(i)});
      }
    }
  }
  for (auto& group : groups) {
    const auto lost =
        static_cast<int64_t>(std::floor(static_cast<double>(group.size()) * rule.sparsity));
    std::sort(group.begin(), group.end(), [](const Weight& a, const Weight& b) {
      const double of_a = a.there ? a.quantity : 0, of_b = b.there ? b.quantity : 0;
      return std::tie(a.there, of_a, a.unit, a.matrix, a.position) <
             std::tie(b.there, of_b, b.unit, b.matrix, b.position);
    });
    for (int64_t i = 0; i < static_cast<int64_t>(group.size()); ++i)
      if (i < lost || !group[i].there)
        masks[group[i].unit][group[i].matrix][group[i].position] = true;
  }
  return masks;
}

struct Pruned {
  std::vector<JudgedMatrices> units;
  DseeLosses losses;
};

Pruned pruned(const DseeRule& rule, int worker_count = 1) {
  linalg::one_library_thread();
  Workers workers(worker_count, linalg::one_library_thread);
  return {pruned_model(rule, workers, comm::Communicator::self()),
          losses_of(rule, workers, comm::Communicator::self())};
}

TEST(Dsee, EachGroupLosesItsShareByOneThresholdOverAllBlocks) {
  for (const Criterion criterion : {Criterion::delta, Criterion::merged, Criterion::magnitude})
    for (const double sparsity : {0.0, 0.3, 0.5, 0.9})
      for (const bool keep_zeros : {true, false}) {
        const DseeRule rule{criterion, sparsity, 7, keep_zeros};
        const Masks expected = plain_masks(rule);
        const Pruned found = pruned(rule);
        for (int64_t unit = 0; unit < kUnits; ++unit)
          for (size_t t = 0; t < found.units[unit].tasks.size(); ++t) {
            const MatrixTask& task = found.units[unit].tasks[t];
            const uint8_t* mask = task.mask.const_data_ptr<uint8_t>();
            const std::vector<bool> marked(mask, mask + task.mask.numel());
            EXPECT_TRUE(marked == expected[unit][t])
                << task.name << " " << static_cast<int>(criterion) << " " << sparsity << keep_zeros;
          }
        for (const auto& group : {found.losses.with_terms, found.losses.without_terms})
          EXPECT_EQ(group.lost, static_cast<int64_t>(std::floor(group.weights * sparsity)));
      }
}

TEST(Dsee, ThresholdsHoldOverTheModelAndNotInEachMatrix) {
  const Pruned found = pruned({Criterion::delta, 0.5, 7, true});
  std::vector<double> shares;
  for (const JudgedMatrices& unit : found.units)
    for (size_t t = 0; t < unit.tasks.size(); ++t)
      if (unit.terms[t]) shares.push_back(unit.tasks[t].mask.to(at::kDouble).mean().item<double>());
  const auto [low, high] = std::minmax_element(shares.begin(), shares.end());
  EXPECT_GT(*high - *low, 0.2);  // later blocks have larger terms
}

TEST(Dsee, OnlyTheMatrixIsMasked) {
  const Pruned found = pruned({Criterion::delta, 0.5, 7, true});
  for (int64_t unit = 0; unit < kUnits; ++unit) {
    const JudgedMatrices before = judged_unit(unit);
    for (size_t t = 0; t < before.tasks.size(); ++t) {
      const MatrixTask& task = found.units[unit].tasks[t];
      EXPECT_TRUE(at::equal(task.weight, before.tasks[t].weight * task.mask.eq(0)));
      if (before.terms[t]) {
        EXPECT_TRUE(at::equal(found.units[unit].terms[t]->up, before.terms[t]->up));
        EXPECT_TRUE(at::equal(found.units[unit].terms[t]->values, before.terms[t]->values));
      }
    }
  }
}

TEST(Dsee, RandomMasksAreOfTheSeedAndCountedLikeTheOthers) {
  const DseeRule rule{Criterion::random, 0.5, 7, true};
  DseeRule other = rule;
  other.seed = 8;
  const Pruned one = pruned(rule), two = pruned(rule, 2), three = pruned(other);
  EXPECT_EQ(one.losses.with_terms.lost, one.losses.with_terms.weights / 2);
  const auto mask = [](const Pruned& p) { return p.units[0].tasks[0].mask; };
  EXPECT_TRUE(at::equal(mask(one), mask(two)));
  EXPECT_FALSE(at::equal(mask(one), mask(three)));
}

TEST(Dsee, TermsThatAreNotFiniteAreRefusedByTheMatrixName) {
  JudgedMatrices unit = judged_unit(0);
  unit.terms[0]->up[3][0] = INFINITY;
  try {
    judged_rows(Criterion::delta, unit.tasks[0].name, unit.tasks[0].weight, unit.terms[0], 1, 0, 8);
    FAIL();
  } catch (const NumericalError& error) {
    EXPECT_NE(std::string(error.what()).find(unit.tasks[0].name), std::string::npos);
  }
}

}  // namespace
}  // namespace espalier::prune
