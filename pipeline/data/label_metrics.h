#pragma once
/// How well predictions agree with labels, as scikit-learn and SciPy define it. Sums are float64 in
/// the order of the rows, so that a metric has the same bits wherever its rows were computed.

#include <map>
#include <span>
#include <string>
#include <vector>

#include "pipeline/data/token_set.h"

namespace espalier::data {

/// Share of equal pairs.
double accuracy(std::span<const int64_t> predicted, std::span<const int64_t> labels);

/// 2 TP / (2 TP + FP + FN) of class 1 where there are two classes; of more, the mean over the
/// classes that are predicted or are labels (macro). 0 for a class that is never right.
double f1(std::span<const int64_t> predicted, std::span<const int64_t> labels, int64_t classes);

/// Matthews' correlation, of more than two classes Gorodkin's R_K (2004); 0 when either side holds
/// one class only.
double matthews(std::span<const int64_t> predicted, std::span<const int64_t> labels,
                int64_t classes);

/// NaN when either side is constant (or there are fewer than two rows).
double pearson(std::span<const double> predicted, std::span<const double> labels);
/// Pearson's correlation of the ranks; ties share the mean of their ranks.
double spearman(std::span<const double> predicted, std::span<const double> labels);
double mean_squared_error(std::span<const double> predicted, std::span<const double> labels);

/// By name: accuracy, f1, matthews; of a regression pearson, spearman, mean_squared_error.
using Metrics = std::map<std::string, double>;

/// The metrics of rows with these labels (of a set's or of a part of it). logits
/// [rows * max(1, classes)], row by row; the class of a row is its largest logit, the first of
/// equals. classes 0: a regression. Throws DefectError when there are not as many logits as asked.
Metrics label_metrics(int64_t classes, std::span<const double> labels,
                      std::span<const double> logits);

/// The metrics GLUE reports for the set's task: matthews for CoLA, accuracy and f1 for MRPC and
/// QQP, pearson and spearman for a regression, else accuracy. The first is the one to choose by.
std::vector<std::string> metrics_of_task(const TokenSet& set);

}  // namespace espalier::data
