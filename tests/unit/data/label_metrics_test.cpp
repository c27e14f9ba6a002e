#include "pipeline/data/label_metrics.h"

#include <gtest/gtest.h>

#include <cmath>

#include "pipeline/errors.h"

namespace espalier::data {
namespace {

using Classes = std::vector<int64_t>;
using Numbers = std::vector<double>;

// By hand: 3 true positives, 1 false one, 2 missed, 4 true negatives.
const Classes kLabels = {1, 1, 1, 1, 1, 0, 0, 0, 0, 0};
const Classes kPredicted = {1, 1, 1, 0, 0, 1, 0, 0, 0, 0};

TEST(LabelMetrics, TwoClassesCountedByHand) {
  EXPECT_DOUBLE_EQ(accuracy(kPredicted, kLabels), 0.7);
  EXPECT_DOUBLE_EQ(f1(kPredicted, kLabels, 2), 2 * 3.0 / (2 * 3 + 1 + 2));
  EXPECT_DOUBLE_EQ(matthews(kPredicted, kLabels, 2), (3 * 4 - 1 * 2) / std::sqrt(4.0 * 5 * 5 * 6));
}

TEST(LabelMetrics, F1IsOfClassOneAndNotOfTheOther) {
  Classes labels, predicted;
  for (size_t i = 0; i < kLabels.size(); ++i) {
    labels.push_back(1 - kLabels[i]);
    predicted.push_back(1 - kPredicted[i]);
  }
  EXPECT_DOUBLE_EQ(f1(predicted, labels, 2), 2 * 4.0 / (2 * 4 + 2 + 1));
  EXPECT_DOUBLE_EQ(matthews(predicted, labels, 2), matthews(kPredicted, kLabels, 2));
}

TEST(LabelMetrics, ThreeClassesAreAveragedAndCorrelatedAsOne) {
  const Classes labels = {0, 0, 1, 1, 2, 2}, predicted = {0, 1, 1, 1, 2, 0};
  // Class 0: 1 of 2 and 2; class 1: 2 of 3 and 2; class 2: 1 of 1 and 2.
  EXPECT_DOUBLE_EQ(f1(predicted, labels, 3), (2.0 / 4 + 4.0 / 5 + 2.0 / 3) / 3);
  // Gorodkin: (c s - Sum p t) / sqrt((s^2 - Sum p^2)(s^2 - Sum t^2)), c = 4, s = 6.
  EXPECT_DOUBLE_EQ(matthews(predicted, labels, 3),
                   (4 * 6 - (2 * 2 + 3 * 2 + 1 * 2)) / std::sqrt((36.0 - 14) * (36.0 - 12)));
}

TEST(LabelMetrics, AClassThatNeitherSideHasIsLeftOutOfTheMean) {
  const Classes labels = {0, 0, 1}, predicted = {0, 1, 1};
  EXPECT_DOUBLE_EQ(f1(predicted, labels, 5), (2.0 / 3 + 2.0 / 3) / 2);
}

TEST(LabelMetrics, OneClassOnlyIsNoCorrelationAndNoError) {
  const Classes ones(4, 1), zeros(4, 0), mixed = {0, 1, 0, 1};
  EXPECT_EQ(matthews(ones, mixed, 2), 0);
  EXPECT_EQ(matthews(ones, ones, 2), 0);
  EXPECT_EQ(f1(zeros, zeros, 2), 0);
  EXPECT_EQ(f1(ones, zeros, 2), 0);
  EXPECT_EQ(f1(ones, ones, 2), 1);
}

TEST(LabelMetrics, PearsonByHandAndOfALine) {
  const Numbers x = {1, 2, 3, 5}, y = {2, 1, 4, 6};
  // Means 2.75 and 3.25: covariance 10.25, spreads 8.75 and 14.75.
  EXPECT_NEAR(pearson(x, y), 10.25 / std::sqrt(8.75 * 14.75), 1e-15);
  const Numbers line = {-3, -6, -9, -15};
  EXPECT_DOUBLE_EQ(pearson(x, line), -1);
}

TEST(LabelMetrics, SpearmanGivesTiesTheMeanOfTheirRanks) {
  const Numbers x = {10, 20, 20, 5}, y = {1, 7, 9, 7};
  // Ranks 2 3.5 3.5 1 and 1 2.5 4 2.5: covariance 2.25, both spreads 4.5.
  EXPECT_NEAR(spearman(x, y), 2.25 / 4.5, 1e-15);
  const Numbers grown = {100, 8000, 8000, 25};  // only the order counts
  EXPECT_DOUBLE_EQ(spearman(grown, y), spearman(x, y));
}

TEST(LabelMetrics, AConstantSideHasNoCorrelation) {
  const Numbers constant = {3, 3, 3}, y = {1, 2, 3}, one = {1};
  EXPECT_TRUE(std::isnan(pearson(constant, y)));
  EXPECT_TRUE(std::isnan(spearman(y, constant)));
  EXPECT_TRUE(std::isnan(pearson(one, one)));
  EXPECT_DOUBLE_EQ(mean_squared_error(constant, y), 5.0 / 3);
}

TEST(LabelMetrics, TheClassOfARowIsItsLargestLogitTheFirstOfEquals) {
  const Numbers labels = {0, 1, 0}, logits = {2, 2, -1, 3, 0.5, 0.25};
  const Metrics metrics = label_metrics(2, labels, logits);
  EXPECT_EQ(metrics.at("accuracy"), 1);
  EXPECT_EQ(metrics.at("f1"), 1);
  EXPECT_THROW(label_metrics(2, labels, Numbers{1, 2, 3}), DefectError);
  EXPECT_EQ(label_metrics(0, labels, Numbers{0, 1, 0}).at("pearson"), 1);
}

}  // namespace
}  // namespace espalier::data
