#include "pipeline/train/loop.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <vector>

#include "pipeline/comm/exact_sum.h"
#include "pipeline/errors.h"
#include "pipeline/longest_first.h"
#include "pipeline/train/step_checkpoint.h"

namespace espalier::train {

namespace {

using Clock = std::chrono::steady_clock;

std::span<const float> span_of(const at::Tensor& contiguous) {
  return {contiguous.const_data_ptr<float>(), static_cast<size_t>(contiguous.numel())};
}

/// Largest magnitude; throws on NaN and Inf.
double checked_largest(std::span<const float> values, const std::string& name, int64_t step) {
  float largest = 0;
  bool finite = true;
  for (const float v : values) {
    finite &= std::isfinite(v);
    largest = std::max(largest, std::fabs(v));
  }
  if (!finite)
    throw NumericalError(fmt::format(
        "step {}: the gradient of {} is not finite; lower learning_rate or train in float32",
        step + 1, name));
  return largest;
}

class Loop {
 public:
  Loop(const LoopOptions& options, Problem& problem, const LoopEvents& events, Workers& workers,
       const comm::Communicator& group)
      : options_(options),
        problem_(problem),
        events_(events),
        workers_(workers),
        group_(group),
        parameters_(*problem.parameters),
        adamw_(parameters_.size(), options.adamw),
        gradient_(parameters_.size()),
        exact_(parameters_.size() + 1),
        worker_losses_(workers.count()) {
    std::vector<int64_t> sizes;
    for (const Parameter& p : parameters_.parameters()) sizes.push_back(p.value.numel());
    sizes.push_back(1);  // the loss
    segments_ = static_cast<int64_t>(sizes.size());
    sums_.assign(workers.count(), comm::ExactSum(sizes, options.units));
  }

  LoopResult run();

 private:
  void resume();
  void save();
  void find_first_grid();
  void sum_units();
  std::vector<int64_t> units_of_this_rank() const;
  void compute_units();
  void take_step();
  void validate();
  bool out_of_patience() const { return options_.patience > 0 && unimproved_ >= options_.patience; }
  UnitLoss run_unit(int64_t unit, const GradientSink& sink) const;
  double largest_of_gradients() const;
  void say(const std::string& line) const {
    if (group_.is_root() && events_.say) events_.say(line);
  }

  const LoopOptions& options_;
  Problem& problem_;
  const LoopEvents& events_;
  Workers& workers_;
  const comm::Communicator& group_;
  ParameterSet& parameters_;
  Adamw adamw_;
  std::vector<float> gradient_;
  std::vector<double> exact_;         // the sums of a step: every parameter's, then the loss
  std::vector<comm::ExactSum> sums_;  // one a worker
  std::vector<UnitLoss> worker_losses_;
  std::vector<double> largest_;  // per segment, the previous step's largest unit
  int64_t segments_ = 0, step_ = 0, counted_ = 0, step_tokens_ = 0;
  int64_t unimproved_ = 0;          // validations since the best one
  std::vector<float> best_values_;  // only where the best are kept
  LoopResult result_;
};

UnitLoss Loop::run_unit(int64_t unit, const GradientSink& sink) const {
  const UnitLoss loss = problem_.unit(step_, unit, sink);
  if (!std::isfinite(loss.loss))
    throw NumericalError(fmt::format(
        "step {}, micro-batch {}: the loss is {}; lower learning_rate or train in float32",
        step_ + 1, unit, loss.loss));
  return loss;
}

/// Step 0 has no previous step: its grid comes from unit 0, computed once more for that.
void Loop::find_first_grid() {
  largest_.assign(segments_, 0.0);
  if (group_.is_root()) {
    const UnitLoss loss = run_unit(0, [&](int64_t parameter, const at::Tensor& gradient) {
      largest_[parameter] = checked_largest(span_of(gradient.contiguous()),
                                            parameters_.parameters()[parameter].name, step_);
    });
    largest_[segments_ - 1] = loss.loss;
  }
  group_.broadcast(comm::bytes_of(std::span(largest_)));
}

/// A parameter without any gradient so far (SPP's alpha while beta is 0) is given the grid of the
/// largest one: what it becomes in the next step is not known, and 2^-40 of that is fine enough.
double Loop::largest_of_gradients() const {
  return *std::max_element(largest_.begin(), largest_.end() - 1);
}

std::vector<int64_t> Loop::units_of_this_rank() const {
  const std::vector<double> costs =
      problem_.costs ? problem_.costs(step_) : std::vector<double>(options_.units, 1.0);
  return longest_first(costs, group_.size())[group_.rank()];
}

void Loop::compute_units() {
  std::vector<double> grid = largest_;
  for (int64_t s = 0; s < segments_ - 1; ++s)
    if (grid[s] == 0) grid[s] = largest_of_gradients();
  for (comm::ExactSum& sum : sums_) sum.set_grid(grid);
  std::fill(worker_losses_.begin(), worker_losses_.end(), UnitLoss{});

  const std::vector<int64_t> mine = units_of_this_rank();
  workers_.for_each(static_cast<int64_t>(mine.size()), [&](int64_t index, int worker) {
    comm::ExactSum& sum = sums_[worker];
    const UnitLoss loss = run_unit(mine[index], [&](int64_t parameter, const at::Tensor& gradient) {
      const at::Tensor whole = gradient.contiguous();
      const std::string& name = parameters_.parameters()[parameter].name;
      try {
        sum.add(parameter, span_of(whole));
      } catch (const NumericalError&) {
        checked_largest(span_of(whole), name, step_);
        throw;
      }
    });
    const auto value = static_cast<float>(loss.loss);
    sum.add(segments_ - 1, std::span(&value, 1));
    worker_losses_[worker].counted += loss.counted;
    worker_losses_[worker].tokens += loss.tokens;
  });
  for (size_t w = 1; w < sums_.size(); ++w) sums_[0].merge(sums_[w]);
  sums_[0].reduce(group_);
}

void Loop::sum_units() {
  for (int attempt = 0;; ++attempt) {
    compute_units();
    const std::span<const double> seen = sums_[0].unit_largest();
    largest_.assign(seen.begin(), seen.end());
    if (!sums_[0].overflowed()) break;
    if (attempt == 1) throw DefectError("a gradient overflows the grid of its own maximum");
    say(
        fmt::format("step {}: a gradient outgrew the grid of its sum; the step is repeated with a "
                    "coarser grid",
                    step_ + 1));
  }
  int64_t totals[2] = {0, 0};
  for (const UnitLoss& loss : worker_losses_) {
    totals[0] += loss.counted;
    totals[1] += loss.tokens;
  }
  group_.all_reduce_sum(totals);
  counted_ = totals[0];
  step_tokens_ = totals[1];
  if (counted_ == 0)
    throw UserError(
        fmt::format("step {}: no token of the whole batch counts in the loss; raise "
                    "sequence_length (the prompts "
                    "fill it) or set train_on_prompt",
                    step_ + 1));
}

void Loop::take_step() {
  const Clock::time_point begin = Clock::now();
  problem_.prepare_step();
  if (largest_.empty()) find_first_grid();
  sum_units();

  sums_[0].result(std::span<double>(exact_));
  const auto counted = static_cast<double>(counted_);
  for (size_t i = 0; i < gradient_.size(); ++i)
    gradient_[i] = static_cast<float>(exact_[i] / counted);

  StepReport report;
  report.loss = exact_.back() / counted;
  report.gradient_norm = clip_gradient(gradient_, options_.max_grad_norm);
  report.learning_rate = options_.learning_rate * options_.schedule.factor(step_);
  ++step_;
  for (const Parameter& p : parameters_.parameters())
    adamw_.update(parameters_.flat().subspan(p.offset, p.value.numel()),
                  std::span<const float>(gradient_).subspan(p.offset, p.value.numel()), p.offset,
                  report.learning_rate * p.learning_rate_factor, step_);

  const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
  if (step_ == 1) result_.loss_first = report.loss;
  result_.loss_last = report.loss;
  result_.steps = step_;
  result_.tokens += step_tokens_;
  result_.seconds += seconds;
  report.step = step_;
  report.tokens = result_.tokens;
  report.tokens_per_second = static_cast<double>(step_tokens_) / seconds;
  if (group_.is_root() && events_.step) events_.step(report);
}

void Loop::validate() {
  problem_.prepare_step();
  const double score = problem_.validate(step_);
  if (!std::isfinite(score))
    throw NumericalError(
        fmt::format("step {}: the validation's score is {}; lower learning_rate", step_, score));
  ++unimproved_;
  if (result_.validations++ > 0 && score >= result_.best_score) return;
  result_.best_score = score;
  result_.best_step = step_;
  unimproved_ = 0;
  if (options_.keep_best) best_values_.assign(parameters_.flat().begin(), parameters_.flat().end());
}

void Loop::save() {
  if (options_.checkpoint_file.empty() || !group_.is_root()) return;
  StepCheckpoint c;
  c.step = step_;
  c.tokens = result_.tokens;
  c.loss_first = result_.loss_first;
  c.loss_last = result_.loss_last;
  c.seconds = result_.seconds;
  c.fingerprint = options_.fingerprint;
  c.values.assign(parameters_.flat().begin(), parameters_.flat().end());
  c.first_moment.assign(adamw_.first_moment().begin(), adamw_.first_moment().end());
  c.second_moment.assign(adamw_.second_moment().begin(), adamw_.second_moment().end());
  c.largest = largest_;
  c.largest.resize(segments_, 0.0);
  c.validations = result_.validations;
  c.best_step = result_.best_step;
  c.unimproved = unimproved_;
  c.best_score = result_.best_score;
  c.best_values = best_values_;
  write_step_checkpoint(options_.checkpoint_file, c);
}

/// Rank 0 reads, the others are given the same bytes: a rank that saw an older file (a network file
/// system's delay) would part from the rest.
void Loop::resume() {
  if (options_.checkpoint_file.empty()) return;
  std::optional<StepCheckpoint> found;
  if (group_.is_root())
    found = read_step_checkpoint(options_.checkpoint_file, options_.fingerprint, parameters_.size(),
                                 segments_);
  int64_t numbers[6] = {0, 0, 0, 0, 0, 0};
  if (found) {
    const auto best = static_cast<int64_t>(found->best_values.size());
    const int64_t stored[6] = {found->step,      found->tokens,     found->validations,
                               found->best_step, found->unimproved, best};
    std::copy(stored, stored + 6, numbers);
  }
  group_.broadcast(comm::bytes_of(std::span<int64_t>(numbers)));
  if (numbers[0] == 0) return;
  double figures[4] = {0, 0, 0, 0};
  largest_.resize(segments_);
  if (found) {
    figures[0] = found->loss_first;
    figures[1] = found->loss_last;
    figures[2] = found->seconds;
    figures[3] = found->best_score;
    best_values_ = found->best_values;
    std::copy(found->values.begin(), found->values.end(), parameters_.flat().begin());
    std::copy(found->first_moment.begin(), found->first_moment.end(),
              adamw_.first_moment().begin());
    std::copy(found->second_moment.begin(), found->second_moment.end(),
              adamw_.second_moment().begin());
    largest_ = found->largest;
  }
  group_.broadcast(comm::bytes_of(std::span<double>(figures)));
  group_.broadcast(comm::bytes_of(parameters_.flat()));
  group_.broadcast(comm::bytes_of(adamw_.first_moment()));
  group_.broadcast(comm::bytes_of(adamw_.second_moment()));
  group_.broadcast(comm::bytes_of(std::span(largest_)));
  best_values_.resize(numbers[5]);
  if (numbers[5] > 0) group_.broadcast(comm::bytes_of(std::span(best_values_)));
  step_ = numbers[0];
  unimproved_ = numbers[4];
  result_ = {numbers[0], numbers[1], figures[0], figures[1], figures[2],
             numbers[2], numbers[3], figures[3], 0};
}

LoopResult Loop::run() {
  resume();
  if (group_.is_root() && events_.started) events_.started(step_);
  int64_t saved = step_;
  while (step_ < options_.steps && !out_of_patience()) {
    take_step();
    if (options_.validate_after && options_.validate_after(step_)) validate();
    const bool last = step_ == options_.steps || out_of_patience();
    const bool due = options_.checkpoint_every > 0 && step_ % options_.checkpoint_every == 0;
    if (last || due) {
      save();
      saved = step_;
    }
    if (!last && events_.stop_requested && events_.stop_requested()) {
      if (saved != step_) save();
      group_.barrier();
      throw Requeue(
          fmt::format("stopped after step {} of {}; the state is saved: start the same "
                      "command again to go on",
                      step_, options_.steps));
    }
  }
  result_.kept_step = step_;
  if (!best_values_.empty()) {
    std::copy(best_values_.begin(), best_values_.end(), parameters_.flat().begin());
    result_.kept_step = result_.best_step;
  }
  return result_;
}

}  // namespace

LoopResult run_loop(const LoopOptions& options, Problem& problem, const LoopEvents& events,
                    Workers& workers, const comm::Communicator& group) {
  return Loop(options, problem, events, workers, group).run();
}

}  // namespace espalier::train
