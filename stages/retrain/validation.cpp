#include "stages/retrain/validation.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "pipeline/errors.h"

namespace espalier::retrain {

namespace {

constexpr int64_t kUnit = 8;  // sequences

std::vector<std::string> metrics_of(const TrainingData& data) {
  if (!data.labelled()) return {"loss", "perplexity"};
  if (data.set().classes() == 0) return {"loss", "pearson", "spearman", "mean_squared_error"};
  return {"loss", "accuracy", "f1", "matthews"};
}

bool larger_is_better(const std::string& metric) {
  return metric != "loss" && metric != "perplexity" && metric != "mean_squared_error";
}

/// What one unit gives: its loss, the labels counted, then every sequence's logits.
std::vector<double> record_of(const AdaptedModel::Evaluation& evaluation) {
  std::vector<double> record = {evaluation.loss.loss, static_cast<double>(evaluation.loss.counted)};
  if (!evaluation.logits.defined()) return record;
  const at::Tensor logits = evaluation.logits.to(at::kDouble).contiguous();
  const double* values = logits.const_data_ptr<double>();
  record.insert(record.end(), values, values + logits.numel());
  return record;
}

}  // namespace

Validation::Validation(TrainingData held, const std::string& metric)
    : held_(std::move(held)), metric_(metric) {
  if (metric_ == "task")
    metric_ = held_.labelled() ? data::metrics_of_task(held_.set()).front() : "loss";
  const std::vector<std::string> legal = metrics_of(held_);
  if (std::find(legal.begin(), legal.end(), metric_) == legal.end())
    throw UserError(fmt::format("retrain.validate.metric: '{}' is none of the metrics of {}: {}",
                                metric_, held_.set().path().string(), fmt::join(legal, ", ")));
}

data::Metrics Validation::measure(const AdaptedModel& model, uint64_t seed, Workers& workers,
                                  const comm::Communicator& group) const {
  const int64_t sequences = held_.epoch_sequences(), ranks = group.size(), rank = group.rank();
  const int64_t units = (sequences + kUnit - 1) / kUnit;
  const int64_t mine = std::max<int64_t>(0, (units - rank + ranks - 1) / ranks);
  std::vector<std::vector<double>> records(mine);
  workers.for_each(mine, [&](int64_t index, int) {
    const int64_t first = (rank + index * ranks) * kUnit;
    const int64_t count = std::min(kUnit, sequences - first);
    UnitKey key{seed, 0, first, count};
    key.evaluating = true;
    records[index] = record_of(model.evaluate(held_.batch(first, count), key));
  });
  std::vector<double> flat;
  for (const std::vector<double>& record : records)
    flat.insert(flat.end(), record.begin(), record.end());
  const auto all = group.all_gather(comm::bytes_of(std::span(flat)));

  std::vector<size_t> position(ranks, 0);
  std::vector<double> logits;
  double loss = 0, counted = 0;
  const int64_t each = held_.labelled() ? held_.logits() : 0;
  for (int64_t u = 0; u < units; ++u) {
    const int64_t rows = std::min(kUnit, sequences - u * kUnit);
    std::vector<double> record(2 + rows * each);
    const std::vector<std::byte>& from = all[u % ranks];
    std::memcpy(record.data(), from.data() + position[u % ranks], record.size() * sizeof(double));
    position[u % ranks] += record.size() * sizeof(double);
    loss += record[0];
    counted += record[1];
    logits.insert(logits.end(), record.begin() + 2, record.end());
  }
  if (counted == 0)
    throw UserError(fmt::format("{}: nothing that is held out counts in the loss",
                                held_.set().path().string()));
  data::Metrics metrics;
  if (held_.labelled()) {
    std::vector<double> labels;
    for (int64_t i = 0; i < sequences; ++i) labels.push_back(held_.label(i));
    metrics = data::label_metrics(held_.set().classes(), labels, logits);
  } else {
    metrics["perplexity"] = std::exp(loss / counted);
  }
  metrics["loss"] = loss / counted;
  return metrics;
}

double Validation::score(const data::Metrics& metrics) const {
  const double value = metrics.at(metric_);
  if (!larger_is_better(metric_)) return value;
  return std::isnan(value) ? 1.0 : -value;
}

double Validation::value(double score) const { return larger_is_better(metric_) ? -score : score; }

}  // namespace espalier::retrain
