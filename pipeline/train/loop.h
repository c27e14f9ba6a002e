#pragma once
/// The training loop: units of work shared over ranks and workers, their gradients summed exactly,
/// one clipped AdamW step on every rank alike, validation, checkpoints. It knows nothing of models.
///
/// A step has a fixed number of units (micro-batches), shared over the ranks by their cost
/// (longest_first.h); one runs on whichever of its rank's workers is free. Its loss and
/// gradients go to integer sums (comm/exact_sum.h), so that every number of ranks and workers and
/// every way of sharing gives the same bits. One all-reduce of 8 bytes a parameter a step.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/train/adamw.h"
#include "pipeline/train/parameters.h"
#include "pipeline/train/schedule.h"
#include "pipeline/workers.h"

namespace espalier::train {

struct LoopOptions {
  int64_t steps = 0;
  int64_t units = 1;  ///< a step, over all ranks
  double learning_rate = 0;
  Schedule schedule;
  AdamwOptions adamw;
  double max_grad_norm = 0;               ///< 0: no clipping
  int64_t checkpoint_every = 0;           ///< steps; 0: only when asked to stop and at the end
  std::filesystem::path checkpoint_file;  ///< empty: no checkpoints
  std::string fingerprint;                ///< of all that the steps' bits depend on
  /// Whether to validate after that many steps; empty: never.
  std::function<bool(int64_t steps)> validate_after;
  bool keep_best = false;  ///< leave the values of the best validation, the earliest of equal ones
  int64_t patience = 0;    ///< end after so many validations without a better one; 0: never
};

struct UnitLoss {
  double loss = 0;      ///< summed over the unit's counted labels
  int64_t counted = 0;  ///< labels that count
  int64_t tokens = 0;   ///< tokens passed through the model
};

/// Takes the gradient of the unit's loss sum for one parameter, once each; a parameter that a unit
/// does not reach need not be given.
using GradientSink = std::function<void(int64_t parameter, const at::Tensor& gradient)>;

/// What is trained.
struct Problem {
  ParameterSet* parameters = nullptr;
  /// Once before the units of each step, on every rank; may use the workers.
  std::function<void()> prepare_step;
  /// Loss and gradients of one unit on the calling worker. `step` counts from 0.
  std::function<UnitLoss(int64_t step, int64_t unit, const GradientSink& sink)> unit;
  /// The work of each unit of a step, the same on every rank; empty: all alike.
  std::function<std::vector<double>(int64_t step)> costs;
  /// The score of the parameters as they are after `steps` steps, lower is better; collective,
  /// the same bits on every rank. Called behind prepare_step.
  std::function<double(int64_t steps)> validate;
};

struct StepReport {
  int64_t step = 0;  ///< steps done
  double loss = 0, learning_rate = 0, gradient_norm = 0, tokens_per_second = 0;
  int64_t tokens = 0;  ///< of the whole run
};

/// Rank 0's audience, and the wish to stop.
struct LoopEvents {
  std::function<void(int64_t done)> started;  ///< with the steps that an earlier start did
  std::function<void(const StepReport&)> step;
  std::function<void(const std::string&)> say;
  std::function<bool()> stop_requested;  ///< collective
};

struct LoopResult {
  int64_t steps = 0, tokens = 0;
  double loss_first = 0, loss_last = 0;
  double seconds = 0;  ///< of all starts
  int64_t validations = 0, best_step = 0;
  double best_score = 0;  ///< when there were validations
  int64_t kept_step = 0;  ///< whose values are left
};

/// Trains until options.steps or out of patience, going on from the checkpoint when there is one.
/// The best values so far are part of it: a kill at any moment, also between validating and saving,
/// repeats what was not saved and gives the same bits. Collective. Throws
/// NumericalError naming parameter and step on a loss or gradient that is not finite, Requeue
/// after saving when asked to stop.
LoopResult run_loop(const LoopOptions& options, Problem& problem, const LoopEvents& events,
                    Workers& workers, const comm::Communicator& group);

}  // namespace espalier::train
