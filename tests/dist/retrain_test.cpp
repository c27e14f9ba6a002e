// Retraining on any number of ranks and workers: the adapters' bits, and runs that are cut off.
#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "pipeline/comm/communicator.h"
#include "pipeline/linalg/product.h"
#include "stages/retrain/adapted_model.h"
#include "stages/retrain/validation.h"
#include "tests/unit/retrain/configured_method.h"
#include "tests/unit/retrain/tiny_llama.h"

namespace espalier::retrain {
namespace {

constexpr double kTimeoutSeconds = 120;
constexpr int64_t kSteps = 6, kBatch = 6, kMicroBatch = 2;

struct Killed {};

/// A directory that every rank sees, with the model and the text in it.
class Retrain : public testing::Test {
 protected:
  Retrain() : world_(comm::Communicator::world(kTimeoutSeconds)) {
    directory_ = world_.broadcast(
        (std::filesystem::temp_directory_path() / ("espalier_retrain_" + std::to_string(getpid())))
            .string());
    if (world_.is_root()) {
      write_tiny_llama(directory_);
      write_tiny_text(directory_ / "text.h5");
    }
    world_.barrier();
  }
  ~Retrain() override {
    world_.barrier();
    if (world_.is_root()) std::filesystem::remove_all(directory_);
  }

  struct Case {
    double dropout = 0;
    bool recompute = false;
    at::ScalarType type = at::kBFloat16;
    std::vector<std::string> method = {"retrain=spp", "retrain.row_groups=8"};
    bool validated = false;  // every second step, the best kept
    bool uneven = false;     // units of unlike cost, and so dealt otherwise
  };
  /// The adapters after kSteps steps; throws Killed on every rank after `killed_after` steps.
  std::vector<float> trained(const Case& c, const comm::Communicator& group, int worker_count,
                             const std::filesystem::path& state = {}, int64_t killed_after = 0) {
    const io::Checkpoint checkpoint = io::Checkpoint::open(directory_);
    const model::Architecture architecture = model::read_architecture(checkpoint);
    const data::TokenSet text = data::TokenSet::open(directory_ / "text.h5");
    const TrainingData sampler(text, 1, 24, true, {c.validated ? 0.3 : 0.0, false});
    std::vector<std::string> overrides = c.method;
    overrides.push_back("retrain.dropout=" + std::to_string(c.dropout));
    Workers workers(worker_count, linalg::one_library_thread);
    ModelOptions options;
    options.attach.seed = 5;
    options.attach.workers = &workers;
    options.attach.group = &group;
    AdaptedModel model(checkpoint, architecture, c.type, *configured(overrides), options);
    const auto parameters = model.make_parameters(3);

    train::LoopOptions loop;
    loop.steps = kSteps;
    loop.units = kBatch / kMicroBatch;
    loop.learning_rate = 4e-3;
    loop.schedule = train::make_schedule("linear", kSteps, 1, 0);
    loop.max_grad_norm = 1;
    loop.checkpoint_every = 2;
    loop.checkpoint_file = state;
    train::Problem problem;
    problem.parameters = parameters.get();
    problem.prepare_step = [&] { model.adapter().prepare_step(workers); };
    problem.unit = [&](int64_t step, int64_t unit, const train::GradientSink& sink) {
      return model.loss_and_gradients(
          sampler.batch(step * kBatch + unit * kMicroBatch, kMicroBatch),
          {1, step, unit * kMicroBatch, kMicroBatch}, c.recompute, sink);
    };
    if (c.uneven)
      problem.costs = [](int64_t step) {
        std::vector<double> costs;
        for (int64_t unit = 0; unit < kBatch / kMicroBatch; ++unit)
          costs.push_back(1.0 + static_cast<double>((5 * unit + step) % 7));
        return costs;
      };
    const Validation validation(TrainingData(text, 1, 24, true, {0.3, true}), "loss");
    problem.validate = [&](int64_t) {
      return validation.score(validation.measure(model, 1, workers, group));
    };
    if (c.validated) loop.validate_after = [](int64_t done) { return done % 2 == 0; };
    loop.keep_best = true;
    train::LoopEvents events;
    int64_t steps = 0;
    events.stop_requested = [&]() -> bool {
      if (++steps == killed_after) throw Killed{};
      return false;
    };
    const train::LoopResult result = train::run_loop(loop, problem, events, workers, group);
    std::vector<float> left(parameters->flat().begin(), parameters->flat().end());
    if (c.validated) left.push_back(static_cast<float>(result.best_score));
    return left;
  }

  comm::Communicator world_;
  std::filesystem::path directory_;
};

TEST_F(Retrain, AdaptersAreTheSameBitsOnAnyNumberOfRanksAndWorkers) {
  for (const Case& c : {Case{}, Case{0.1, false, at::kBFloat16}, Case{0, true, at::kFloat},
                        Case{0, false, at::kBFloat16, {"retrain=full"}, true}}) {
    const std::vector<float> alone = trained(c, comm::Communicator::self(), 1);
    EXPECT_EQ(trained(c, world_, 1), alone);
    EXPECT_EQ(trained(c, world_, 2), alone);
    Case uneven = c;
    uneven.uneven = true;
    EXPECT_EQ(trained(uneven, world_, 1), alone);
  }
}

/// Every method that has something to train in a model without biases.
const std::vector<std::vector<std::string>> kMethods = {
    {"retrain=lora", "retrain.adapter_rank=4"},
    {"retrain=lora_masked", "retrain.adapter_rank=4"},
    {"retrain=lora_star", "retrain.adapter_rank=4"},
    {"retrain=dsee", "retrain.adapter_rank=4", "retrain.index_sets=random"},
    {"retrain=lora_xs", "retrain.adapter_rank=4"},
    {"retrain=lora_xs", "retrain.adapter_rank=4", "retrain.subspace=bottom"},
    {"retrain=vera", "retrain.adapter_rank=8"},
    {"retrain=ether", "retrain.blocks=4"},
    {"retrain=ether_plus", "retrain.blocks=4"},
    {"retrain=oft", "retrain.blocks=8"},
    {"retrain=naive", "retrain.blocks=8"}};

TEST_F(Retrain, EveryMethodIsTheSameBitsOnAnyNumberOfRanksAndWorkers) {
  for (const auto& method : kMethods) {
    SCOPED_TRACE(method.front());
    const Case c{0.1, false, at::kBFloat16, method};
    const std::vector<float> alone = trained(c, comm::Communicator::self(), 1);
    EXPECT_EQ(trained(c, world_, 1), alone);
    EXPECT_EQ(trained(c, world_, 2), alone);
  }
}

TEST_F(Retrain, KilledAndResumedIsTheUndisturbedRunAlsoOnAnotherNumberOfRanks) {
  const Case c{0.1, false, at::kBFloat16};
  const std::vector<float> undisturbed = trained(c, world_, 1);
  const auto state = directory_ / "state" / "step.h5";
  EXPECT_THROW(trained(c, world_, 1, state, 3), Killed);  // one step after the checkpoint
  world_.barrier();
  if (world_.is_root()) {
    ASSERT_TRUE(std::filesystem::exists(state));
    std::filesystem::copy_file(state, directory_ / "copy.h5");
    EXPECT_EQ(trained(c, comm::Communicator::self(), 1, directory_ / "copy.h5"), undisturbed);
  }
  world_.barrier();
  EXPECT_EQ(trained(c, world_, 1, state), undisturbed);
}

}  // namespace
}  // namespace espalier::retrain
