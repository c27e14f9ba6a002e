#pragma once
/// Measuring a model while it is trained, on sequences it does not train on.

#include <string>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/data/label_metrics.h"
#include "pipeline/workers.h"
#include "stages/retrain/adapted_model.h"
#include "stages/retrain/training_data.h"

namespace espalier::retrain {

class Validation {
 public:
  /// `metric`: loss or one of metrics_of(held); "task" is the first that the task reports.
  /// Throws UserError placed at retrain.validate.metric listing the metrics there are.
  Validation(TrainingData held, const std::string& metric);

  const std::string& metric() const { return metric_; }
  int64_t sequences() const { return held_.epoch_sequences(); }

  /// Every metric of the parameters as they are, prepare_step done: loss (the mean), and perplexity
  /// or the metrics of the labels. Units of 8 sequences in a fixed order; sums in their order.
  /// Collective; the same bits on any number of ranks and workers.
  data::Metrics measure(const AdaptedModel& model, uint64_t seed, Workers& workers,
                        const comm::Communicator& group) const;
  /// Of the metric chosen; lower is better. A correlation of constant predictions is the worst.
  double score(const data::Metrics& metrics) const;
  /// The metric's value of a score.
  double value(double score) const;

 private:
  TrainingData held_;
  std::string metric_;
};

}  // namespace espalier::retrain
