#include "pipeline/train/loop.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "pipeline/errors.h"
#include "pipeline/random.h"
#include "pipeline/train/step_checkpoint.h"

namespace espalier::train {
namespace {

constexpr int64_t kUnits = 6, kCounted = 4;

/// A least-squares toy: unit u of step s pulls every parameter towards its own random point.
struct Toy {
  ParameterSet parameters{{{"a", at::ones({5}), 1.0}, {"b", at::zeros({3, 2}), 0.5}}};
  std::function<double(int64_t step, int64_t unit)> weight = [](int64_t, int64_t) { return 1.0; };

  Problem problem() {
    Problem p;
    p.parameters = &parameters;
    p.prepare_step = [] {};
    p.unit = [this](int64_t step, int64_t unit, const GradientSink& sink) {
      UnitLoss loss{0.0, kCounted, 8};
      for (size_t i = 0; i < parameters.parameters().size(); ++i) {
        const at::Tensor& value = parameters.parameters()[i].value;
        const at::Tensor gradient = at::empty(value.sizes());
        const CounterRandom random(9, "toy", static_cast<uint64_t>(step * 100 + unit));
        for (int64_t e = 0; e < value.numel(); ++e) {
          const double pull =
              weight(step, unit) *
              (value.const_data_ptr<float>()[e] - random.normal(static_cast<uint64_t>(e) + 10 * i));
          gradient.data_ptr<float>()[e] = static_cast<float>(pull);
          loss.loss += 0.5 * pull * pull;
        }
        sink(static_cast<int64_t>(i), gradient);
      }
      return loss;
    };
    return p;
  }
};

LoopOptions options() {
  LoopOptions o;
  o.steps = 12;
  o.units = kUnits;
  o.learning_rate = 0.05;
  o.schedule = make_schedule("linear", 12, 2, 0);
  o.adamw.weight_decay = 0.01;
  o.max_grad_norm = 1.0;
  o.fingerprint = "toy";
  return o;
}

std::filesystem::path fresh(const std::string& name) {
  const auto file = std::filesystem::path(testing::TempDir()) / (name + "_step.h5");
  std::filesystem::remove(file);
  return file;
}

std::vector<float> values(const Toy& toy) {
  return {toy.parameters.flat().begin(), toy.parameters.flat().end()};
}

TEST(Loop, AgreesWithAPlainLoopInDouble) {
  Toy toy;
  Workers workers(1);
  Problem problem = toy.problem();
  run_loop(options(), problem, {}, workers, comm::Communicator::self());

  std::vector<double> w(11, 0.0), m(11, 0.0), v(11, 0.0);
  for (int i = 0; i < 5; ++i) w[i] = 1;
  const LoopOptions o = options();
  for (int64_t step = 0; step < o.steps; ++step) {
    std::vector<double> g(11, 0.0);
    double norm = 0;
    for (int i = 0; i < 11; ++i) {
      for (int64_t u = 0; u < kUnits; ++u) {
        const CounterRandom random(9, "toy", static_cast<uint64_t>(step * 100 + u));
        g[i] += w[i] - random.normal(static_cast<uint64_t>(i < 5 ? i : i - 5 + 10));
      }
      g[i] /= kUnits * kCounted;
      norm += g[i] * g[i];
    }
    const double clip = std::min(1.0, 1.0 / (std::sqrt(norm) + 1e-6));
    for (int i = 0; i < 11; ++i) {
      const double rate = o.learning_rate * o.schedule.factor(step) * (i < 5 ? 1.0 : 0.5);
      g[i] *= clip;
      m[i] = 0.9 * m[i] + 0.1 * g[i];
      v[i] = 0.999 * v[i] + 0.001 * g[i] * g[i];
      const double t = static_cast<double>(step + 1);
      w[i] -= rate * 0.01 * w[i];
      w[i] -= rate * (m[i] / (1 - std::pow(0.9, t))) /
              (std::sqrt(v[i] / (1 - std::pow(0.999, t))) + 1e-8);
    }
  }
  for (int i = 0; i < 11; ++i) EXPECT_NEAR(toy.parameters.flat()[i], w[i], 2e-5) << i;
}

TEST(Loop, TwoWorkersGiveTheBitsOfOne) {
  Toy one, two;
  Workers single(1), pair(2);
  Problem a = one.problem(), b = two.problem();
  run_loop(options(), a, {}, single, comm::Communicator::self());
  run_loop(options(), b, {}, pair, comm::Communicator::self());
  EXPECT_EQ(values(one), values(two));
}

TEST(Loop, StoppedAndResumedGivesTheBitsOfAnUndisturbedRun) {
  Toy whole;
  Workers workers(1);
  Problem problem = whole.problem();
  const LoopResult undisturbed =
      run_loop(options(), problem, {}, workers, comm::Communicator::self());

  LoopOptions with_state = options();
  with_state.checkpoint_file = fresh("resume");
  int64_t stops = 0;
  LoopResult result;
  for (int start = 0; start < 20 && result.steps == 0; ++start) {
    Toy part;
    Problem again = part.problem();
    int64_t steps = 0;
    LoopEvents events;
    events.step = [&](const StepReport&) { ++steps; };
    events.stop_requested = [&] { return steps >= 5; };
    try {
      result = run_loop(with_state, again, events, workers, comm::Communicator::self());
      EXPECT_EQ(values(part), values(whole));
    } catch (const Requeue&) {
      ++stops;
    }
  }
  EXPECT_EQ(stops, 2);
  EXPECT_EQ(result.steps, 12);
  EXPECT_EQ(result.loss_first, undisturbed.loss_first);
  EXPECT_EQ(result.loss_last, undisturbed.loss_last);
  EXPECT_EQ(result.tokens, undisturbed.tokens);
}

TEST(Loop, AGradientThatOutgrowsItsGridRepeatsTheStepAndKeepsTheBits) {
  Workers single(1), pair(2);
  std::vector<std::vector<float>> results;
  int said = 0;
  for (Workers* workers : {&single, &pair}) {
    Toy toy;
    toy.weight = [](int64_t step, int64_t unit) { return step == 4 && unit == 3 ? 1e9 : 1.0; };
    Problem problem = toy.problem();
    LoopEvents events;
    events.say = [&](const std::string& line) {
      ++said;
      EXPECT_NE(line.find("step 5"), std::string::npos) << line;
    };
    run_loop(options(), problem, events, *workers, comm::Communicator::self());
    results.push_back(values(toy));
  }
  EXPECT_EQ(said, 2);
  EXPECT_EQ(results[0], results[1]);
}

TEST(Loop, AGradientThatIsNotFiniteNamesParameterAndStep) {
  Toy toy;
  toy.weight = [](int64_t step, int64_t) {
    return step == 3 ? std::numeric_limits<double>::quiet_NaN() : 1.0;
  };
  Problem problem = toy.problem();
  const auto finite_loss = problem.unit;
  problem.unit = [&](int64_t step, int64_t unit, const GradientSink& sink) {
    UnitLoss loss = finite_loss(step, unit, sink);
    loss.loss = 1.0;
    return loss;
  };
  Workers workers(1);
  try {
    run_loop(options(), problem, {}, workers, comm::Communicator::self());
    FAIL();
  } catch (const NumericalError& error) {
    EXPECT_NE(std::string(error.what()).find("step 4: the gradient of a is not finite"),
              std::string::npos)
        << error.what();
  }
}

/// Scores by the step that is validated; what is left is told apart by its values.
struct Validated {
  std::vector<double> scores;  // by validation, every two steps
  int64_t patience = 0;
  bool keep_best = true;
  int64_t killed_in_validation = 0;  // throws behind that validation, before anything is saved

  struct Killed {};
  LoopResult run(Toy& toy, const std::filesystem::path& state = {}) const {
    Workers workers(1);
    Problem problem = toy.problem();
    int64_t count = 0;
    problem.validate = [&](int64_t steps) {
      if (++count == killed_in_validation) throw Killed{};
      return scores.at(steps / 2 - 1);
    };
    LoopOptions o = options();
    o.validate_after = [](int64_t steps) { return steps % 2 == 0; };
    o.keep_best = keep_best;
    o.patience = patience;
    o.checkpoint_file = state;
    o.checkpoint_every = state.empty() ? 0 : 3;
    return run_loop(o, problem, {}, workers, comm::Communicator::self());
  }
};

/// The values after `steps` steps of the same training.
std::vector<float> values_after(int64_t steps) {
  Toy toy;
  Problem problem = toy.problem();
  Workers workers(1);
  LoopOptions o = options();
  o.steps = steps;
  run_loop(o, problem, {}, workers, comm::Communicator::self());
  return values(toy);
}

TEST(Loop, TheEarliestBestOfTheValidationsIsKept) {
  Toy best, last;
  const LoopResult result = Validated{{5, 3, 4, 3, 6, 9}}.run(best);
  EXPECT_EQ(result.best_step, 4);
  EXPECT_EQ(result.kept_step, 4);
  EXPECT_EQ(result.best_score, 3);
  EXPECT_EQ(result.validations, 6);
  EXPECT_EQ(values(best), values_after(4));
  Validated to_the_end{{5, 3, 4, 3, 6, 9}};
  to_the_end.keep_best = false;
  EXPECT_EQ(to_the_end.run(last).kept_step, 12);
  EXPECT_EQ(values(last), values_after(12));
}

TEST(Loop, PatienceEndsTheTraining) {
  Toy toy;
  Validated impatient{{5, 3, 4, 3, 6, 9}};
  impatient.patience = 2;
  const LoopResult result = impatient.run(toy);
  EXPECT_EQ(result.steps, 8);
  EXPECT_EQ(values(toy), values_after(4));
}

TEST(Loop, KilledBetweenValidatingAndSavingIsTheUndisturbedRun) {
  for (const int64_t patience : {0, 3})
    for (int64_t kill = 1; kill <= 5; ++kill) {
      const auto state = fresh("killed");
      Validated run{{5, 3, 4, 3.5, 6, 9}};
      run.patience = patience;
      Toy undisturbed, killed, resumed, again;
      const LoopResult whole = run.run(undisturbed);
      Validated dying = run;
      dying.killed_in_validation = kill;
      EXPECT_THROW(dying.run(killed, state), Validated::Killed);
      const LoopResult result = run.run(resumed, state);
      EXPECT_EQ(values(resumed), values(undisturbed)) << kill;
      EXPECT_EQ(result.best_step, whole.best_step);
      EXPECT_EQ(result.validations, whole.validations);
      EXPECT_EQ(result.steps, whole.steps);
      EXPECT_EQ(run.run(again, state).best_step, whole.best_step);  // nothing is left to do
      EXPECT_EQ(values(again), values(undisturbed));
    }
}

TEST(StepCheckpoint, AStateOfAnotherTrainingIsRefused) {
  StepCheckpoint c;
  c.step = 3;
  c.fingerprint = "one";
  c.values = c.first_moment = c.second_moment = {1.0f, 2.0f};
  c.largest = {1.0, 2.0};
  const auto file = fresh("other");
  write_step_checkpoint(file, c);
  EXPECT_EQ(read_step_checkpoint(file, "one", 2, 2)->values, c.values);
  EXPECT_THROW(read_step_checkpoint(file, "two", 2, 2), UserError);
  EXPECT_THROW(read_step_checkpoint(file, "one", 3, 2), UserError);
  EXPECT_FALSE(read_step_checkpoint(fresh("absent"), "one", 2, 2).has_value());
}

}  // namespace
}  // namespace espalier::train
