#include "pipeline/linalg/selection.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "pipeline/errors.h"
#include "pipeline/random.h"

namespace espalier::linalg {
namespace {

using Floats = std::vector<float>;

Floats magnitudes(const std::string& purpose, int64_t count, bool ties) {
  const CounterRandom random(3, purpose);
  Floats values(count);
  for (int64_t i = 0; i < count; ++i) {
    const double value = std::fabs(random.normal(i));
    values[i] = static_cast<float>(ties ? std::round(value * 4) / 4 : value);
  }
  return values;
}

std::vector<std::span<const float>> cut_into(const Floats& values, size_t piece) {
  std::vector<std::span<const float>> pieces;
  for (size_t i = 0; i < values.size(); i += piece)
    pieces.push_back(std::span(values).subspan(i, std::min(piece, values.size() - i)));
  return pieces;
}

TEST(Selection, KthSmallestIsTheSortedValueForEverySelectionOfTheBatch) {
  for (const int count : {1, 2}) {
    Workers workers(count);
    const auto group = comm::Communicator::self();
    std::vector<Floats> values;
    std::vector<Selection> batch;
    for (int i = 0; i < 9; ++i) values.push_back(magnitudes("v", 40000 + i, i % 2 == 1));
    for (int64_t i = 0; i < 9; ++i) batch.push_back({cut_into(values[i], 7001), i * 5000});
    batch[8].k = 40007;  // the last
    const Floats found = kth_smallest(batch, workers, group);
    for (size_t i = 0; i < batch.size(); ++i) {
      std::sort(values[i].begin(), values[i].end());
      EXPECT_EQ(found[i], values[i][batch[i].k]) << i;
    }
  }
}

TEST(Selection, ZerosSubnormalsAndTheLargestFloatsAreOrderedExactly) {
  Workers workers(1);
  const Floats values = {3.4028235e38f, 0, 1e-45f, 1e-38f, 0, 1, 3e-45f, 3.4028233e38f};
  Floats sorted = values;
  std::sort(sorted.begin(), sorted.end());
  for (int64_t k = 0; k < 8; ++k)
    EXPECT_EQ(kth_smallest({{{values}, k}}, workers, comm::Communicator::self())[0], sorted[k]);
}

TEST(Selection, APositionOutsideTheValuesIsADefect) {
  Workers workers(1);
  const Floats values = {1, 2};
  EXPECT_THROW(kth_smallest({{{values}, 2}}, workers, comm::Communicator::self()), DefectError);
  EXPECT_THROW(kth_smallest({{{values}, -1}}, workers, comm::Communicator::self()), DefectError);
}

TEST(Selection, TheCutTakesExactlyTheFirstKOfAStableSort) {
  Workers workers(2);
  for (const bool ties : {false, true}) {
    const Floats values = magnitudes("cut", 1000, ties);
    std::vector<int64_t> order(values.size());
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return values[a] < values[b]; });
    auto pieces = cut_into(values, 128);
    std::vector<int64_t> first(pieces.size());
    for (size_t i = 0; i < pieces.size(); ++i) first[i] = static_cast<int64_t>(i) * 128;
    std::swap(pieces[0], pieces[5]);  // pieces in no order, as ranks own them
    std::swap(first[0], first[5]);
    for (const int64_t k : {0, 1, 100, 499, 500, 999, 1000}) {
      const Cut cut = cut_smallest({pieces, k}, first, workers, comm::Communicator::self());
      std::vector<bool> expected(values.size()), taken(values.size());
      for (int64_t i = 0; i < k; ++i) expected[order[i]] = true;
      for (size_t i = 0; i < values.size(); ++i)
        taken[i] = values[i] < cut.threshold ||
                   (values[i] == cut.threshold && static_cast<int64_t>(i) < cut.first_kept_index);
      EXPECT_EQ(taken, expected) << k << " of 1000, ties " << ties;
    }
  }
}

TEST(StreamedSelection, CountsWhatEachPartHasAmongTheSmallestOfAllTiesToTheLowerPart) {
  for (const double share : {0.0, 0.1, 0.5, 0.77, 1.0}) {
    std::vector<Floats> parts;
    for (int i = 0; i < 5; ++i)
      parts.push_back(magnitudes("part" + std::to_string(i), i == 2 ? 0 : 5000 + 700 * i, i != 1));
    for (float& value : parts[4]) value *= 2;
    std::vector<std::pair<float, int>> all;
    for (int i = 0; i < 5; ++i)
      for (const float value : parts[i]) all.emplace_back(value, i);
    std::sort(all.begin(), all.end());
    std::vector<int64_t> expected(5);
    const auto taken = static_cast<size_t>(std::floor(static_cast<double>(all.size()) * share));
    for (size_t i = 0; i < taken; ++i) ++expected[all[i].second];

    StreamedSelection selection(5, share);
    for (int pass = 0; pass < StreamedSelection::kPasses; ++pass) {
      for (int i = 4; i >= 0; --i)
        for (const auto piece : cut_into(parts[i], 999)) selection.add(i, piece);
      selection.finish_pass(comm::Communicator::self());
    }
    EXPECT_EQ(selection.counts(), expected) << share;
    EXPECT_EQ(selection.values(), static_cast<int64_t>(all.size()));
  }
}

}  // namespace
}  // namespace espalier::linalg
