#include "pipeline/data/label_metrics.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "pipeline/errors.h"

namespace espalier::data {
namespace {

using Classes = std::span<const int64_t>;
using Numbers = std::span<const double>;

/// How often each class is predicted, is the label, and is both.
struct Counts {
  std::vector<int64_t> predicted, labels, both;

  Counts(Classes prediction, Classes label, int64_t classes)
      : predicted(classes), labels(classes), both(classes) {
    for (size_t i = 0; i < label.size(); ++i) {
      ++predicted.at(prediction[i]);
      ++labels.at(label[i]);
      if (prediction[i] == label[i]) ++both[label[i]];
    }
  }
  double f1(int64_t c) const {
    return both[c] == 0
               ? 0
               : 2.0 * static_cast<double>(both[c]) / static_cast<double>(predicted[c] + labels[c]);
  }
};

/// Sum of a[c] * b[c] in float64: whole numbers, exact below 2^53.
double products(const std::vector<int64_t>& a, const std::vector<int64_t>& b) {
  double sum = 0;
  for (size_t c = 0; c < a.size(); ++c)
    sum += static_cast<double>(a[c]) * static_cast<double>(b[c]);
  return sum;
}

double mean(Numbers values) {
  double sum = 0;
  for (const double value : values) sum += value;
  return sum / static_cast<double>(values.size());
}

/// Ranks from 1, ties at their mean.
std::vector<double> ranks(Numbers values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return values[a] < values[b]; });
  std::vector<double> rank(values.size());
  for (size_t first = 0; first < order.size();) {
    size_t last = first + 1;
    while (last < order.size() && values[order[last]] == values[order[first]]) ++last;
    for (size_t i = first; i < last; ++i)
      rank[order[i]] = static_cast<double>(first + last + 1) / 2;
    first = last;
  }
  return rank;
}

std::vector<int64_t> largest(Numbers logits, int64_t classes) {
  std::vector<int64_t> winners;
  for (size_t row = 0; row < logits.size(); row += classes) {
    const auto begin = logits.begin() + static_cast<std::ptrdiff_t>(row);
    winners.push_back(std::max_element(begin, begin + classes) - begin);
  }
  return winners;
}

}  // namespace

double accuracy(Classes predicted, Classes labels) {
  int64_t right = 0;
  for (size_t i = 0; i < labels.size(); ++i) right += predicted[i] == labels[i];
  return static_cast<double>(right) / static_cast<double>(labels.size());
}

double f1(Classes predicted, Classes labels, int64_t classes) {
  const Counts counts(predicted, labels, classes);
  if (classes == 2) return counts.f1(1);
  double sum = 0;
  int64_t present = 0;
  for (int64_t c = 0; c < classes; ++c) {
    if (counts.predicted[c] + counts.labels[c] == 0) continue;
    sum += counts.f1(c);
    ++present;
  }
  return sum / static_cast<double>(present);
}

double matthews(Classes predicted, Classes labels, int64_t classes) {
  const Counts counts(predicted, labels, classes);
  const auto n = static_cast<double>(labels.size());
  double right = 0;
  for (const int64_t both : counts.both) right += static_cast<double>(both);
  const double covariance = right * n - products(counts.predicted, counts.labels);
  const double spread = (n * n - products(counts.predicted, counts.predicted)) *
                        (n * n - products(counts.labels, counts.labels));
  return spread == 0 ? 0 : covariance / std::sqrt(spread);
}

double pearson(Numbers predicted, Numbers labels) {
  const double mean_predicted = mean(predicted), mean_label = mean(labels);
  double covariance = 0, spread_predicted = 0, spread_label = 0;
  for (size_t i = 0; i < labels.size(); ++i) {
    const double p = predicted[i] - mean_predicted, l = labels[i] - mean_label;
    covariance += p * l;
    spread_predicted += p * p;
    spread_label += l * l;
  }
  if (spread_predicted == 0 || spread_label == 0) return std::numeric_limits<double>::quiet_NaN();
  return std::clamp(covariance / (std::sqrt(spread_predicted) * std::sqrt(spread_label)), -1.0,
                    1.0);
}

double spearman(Numbers predicted, Numbers labels) {
  return pearson(ranks(predicted), ranks(labels));
}

double mean_squared_error(Numbers predicted, Numbers labels) {
  double sum = 0;
  for (size_t i = 0; i < labels.size(); ++i)
    sum += (predicted[i] - labels[i]) * (predicted[i] - labels[i]);
  return sum / static_cast<double>(labels.size());
}

Metrics label_metrics(int64_t classes, Numbers labels, Numbers logits) {
  if (labels.empty() || logits.size() != labels.size() * std::max<int64_t>(1, classes))
    throw DefectError(
        fmt::format("{} logits for {} rows of {} classes", logits.size(), labels.size(), classes));
  if (classes == 0)
    return {{"pearson", pearson(logits, labels)},
            {"spearman", spearman(logits, labels)},
            {"mean_squared_error", mean_squared_error(logits, labels)}};
  const std::vector<int64_t> right(labels.begin(), labels.end());
  const std::vector<int64_t> predicted = largest(logits, classes);
  return {{"accuracy", accuracy(predicted, right)},
          {"f1", f1(predicted, right, classes)},
          {"matthews", matthews(predicted, right, classes)}};
}

std::vector<std::string> metrics_of_task(const TokenSet& set) {
  if (set.classes() == 0) return {"pearson", "spearman"};
  if (set.task() == "CoLA") return {"matthews"};
  if (set.task() == "MRPC" || set.task() == "QQP") return {"accuracy", "f1"};
  return {"accuracy"};
}

}  // namespace espalier::data
