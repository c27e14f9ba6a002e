#include "stages/retrain/adapted_model.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "pipeline/errors.h"
#include "stages/retrain/adapter_file.h"
#include "stages/retrain/merge.h"
#include "stages/retrain/spp.h"
#include "tests/unit/retrain/tiny_llama.h"

namespace espalier::retrain {
namespace {

struct Tiny {
  std::filesystem::path directory;
  io::Checkpoint checkpoint;
  model::Architecture architecture;
  data::TrainingSampler sampler;
  AdaptedModel model;
  std::unique_ptr<train::ParameterSet> parameters;
  Workers workers{1};

  static std::filesystem::path write(const std::string& name) {
    const auto directory = std::filesystem::path(testing::TempDir()) / ("tiny_" + name);
    write_tiny_llama(directory);
    write_tiny_text(directory / "text.h5");
    return directory;
  }
  static SppOptions options(double dropout) {
    SppOptions options;
    options.groups = 8;
    options.dropout = dropout;
    return options;
  }
  Tiny(const std::string& name, double dropout, const std::vector<std::string>& targets = {},
       at::ScalarType type = at::kFloat)
      : directory(write(name)),
        checkpoint(io::Checkpoint::open(directory)),
        architecture(model::read_architecture(checkpoint)),
        sampler(data::TokenSet::open(directory / "text.h5"), 1, 24, true),
        model(checkpoint, architecture, type, *make_spp(options(dropout)), targets),
        parameters(model.make_parameters(3)) {
    move(0.2);
  }
  void move(double distance) {
    for (size_t i = 0; i < parameters->flat().size(); ++i)
      parameters->flat()[i] +=
          static_cast<float>(distance * CounterRandom(4, "direction").normal(i));
    model.adapter().prepare_step(workers);
  }
  std::pair<double, std::vector<float>> loss_and_gradient(bool recompute) const {
    std::vector<float> flat(parameters->size(), 0.0f);
    const train::UnitLoss loss = model.loss_and_gradients(
        sampler.batch(0, 2), {1, 0, 0, 2}, recompute, [&](int64_t p, const at::Tensor& g) {
          const at::Tensor whole = g.contiguous();
          std::copy_n(whole.const_data_ptr<float>(), whole.numel(),
                      flat.data() + parameters->parameters()[p].offset);
        });
    EXPECT_EQ(loss.counted, 2 * 23);
    return {loss.loss, flat};
  }
};

TEST(AdaptedModel, TheGradientIsTheSlopeOfTheLoss) {
  for (const double dropout : {0.0, 0.2}) {
    Tiny tiny("slope", dropout);
    const auto [loss, gradient] = tiny.loss_and_gradient(false);
    double slope = 0;
    for (size_t i = 0; i < gradient.size(); ++i)
      slope += gradient[i] * CounterRandom(4, "direction").normal(i);
    tiny.move(1e-3);
    const double up = tiny.loss_and_gradient(false).first;
    tiny.move(-2e-3);
    const double down = tiny.loss_and_gradient(false).first;
    EXPECT_NEAR((up - down) / 2e-3, slope, 0.01 * std::abs(slope));
  }
}

TEST(AdaptedModel, ActivationCheckpointingGivesTheSameBits) {
  for (const double dropout : {0.0, 0.2}) {
    const Tiny tiny("recompute", dropout);
    EXPECT_EQ(tiny.loss_and_gradient(false), tiny.loss_and_gradient(true));
  }
}

TEST(AdaptedModel, OnlyTheTargetsAreAdapted) {
  const Tiny tiny("targets", 0, {"v_proj", "down_proj"});
  EXPECT_EQ(tiny.model.targets().size(), 2 * kBlocks);
  EXPECT_EQ(tiny.parameters->size(),
            kBlocks * (8 * kHidden + kHidden / 2 + 8 * kIntermediate + kHidden));
  const auto [loss, gradient] = tiny.loss_and_gradient(false);
  for (const train::Parameter& p : tiny.parameters->parameters()) {
    const auto begin = gradient.begin() + p.offset, end = begin + p.value.numel();
    EXPECT_LT(std::count(begin, end, 0.0f), p.value.numel() / 2) << p.name;
  }
}

TEST(Selection, GlobsMatchLastPartNameInTheBlockAndWholeName) {
  const Tiny tiny("selection", 0);
  const auto method = make_spp(Tiny::options(0));
  const auto matrices = [&](const std::vector<std::string>& targets) {
    return select(tiny.checkpoint, tiny.architecture, *method, targets).matrices.size();
  };
  EXPECT_EQ(matrices({"self_attn.*", "q_proj"}), 4u * kBlocks);
  EXPECT_EQ(matrices({}), 7u * kBlocks);
  EXPECT_EQ(matrices({"model.layers.[12].*"}), 7u * 2);
  EXPECT_EQ(matrices({"model.layers.1.mlp.up_proj.weight"}), 1u);
  try {
    matrices({"v_porj"});
    FAIL();
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("v_porj"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("down_proj"), std::string::npos);
  }
  EXPECT_THROW(matrices({"q_proj", "model.norm.weight"}), UserError);  // SPP trains no norm
}

TEST(AdaptedModel, AWeightThatIsNotFiniteNamesTheBlock) {
  const auto directory = Tiny::write("broken");
  write_tiny_llama(directory);
  Tiny tiny("broken", 0, {"q_proj"});
  tiny.model.targets()[1].weight.fill_(std::numeric_limits<float>::quiet_NaN());
  tiny.model.adapter().prepare_step(tiny.workers);
  try {
    tiny.loss_and_gradient(false);
    FAIL();
  } catch (const NumericalError& error) {
    EXPECT_NE(std::string(error.what()).find("leave block 1"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("step 1"), std::string::npos) << error.what();
  }
}

TEST(Merge, KeepsEveryZeroAndLeavesAModelWithTheAdaptersLoss) {
  Tiny tiny("merge", 0);
  const auto out = tiny.directory / "merged";
  const MergeReport report = write_model(out, tiny.checkpoint, tiny.model, Merge::masked,
                                         tiny.workers, comm::Communicator::self());
  EXPECT_EQ(report.nonzeros_before, report.nonzeros_after);
  EXPECT_EQ(report.filled, 0);
  const io::Checkpoint merged = io::Checkpoint::open(out);
  for (const std::string& name : tiny.checkpoint.names())
    EXPECT_TRUE(at::equal(merged.view(name).eq(0), tiny.checkpoint.view(name).eq(0))) << name;

  AdaptedModel plain(merged, tiny.architecture, at::kFloat, *make_spp(Tiny::options(0)), {});
  const auto parameters = plain.make_parameters(3);  // beta = 0: the merged matrices themselves
  plain.adapter().prepare_step(tiny.workers);
  const double loss =
      plain.loss_and_gradients(tiny.sampler.batch(0, 2), {1, 0, 0, 2}, false, [](auto, auto&) {})
          .loss;
  EXPECT_EQ(loss, tiny.loss_and_gradient(false).first);
}

TEST(AdapterFile, IsTakenUpByTheSameMethodAndBaseAndRefusedByOthers) {
  const Tiny tiny("adapters", 0, {"v_proj"});
  const auto file = tiny.directory / "adapters.h5";
  const AdapterIdentity identity{"spp", "{\"scale\":2}", "sum"};
  write_adapters(file, tiny.model, *tiny.parameters, identity);
  const StoredAdapter stored = StoredAdapter::read(file);

  Tiny again("adapters_again", 0, {"v_proj"});
  stored.copy_into(*again.parameters, again.model);
  EXPECT_TRUE(std::ranges::equal(again.parameters->flat(), tiny.parameters->flat()));

  EXPECT_NO_THROW(stored.require_method("spp", {{"scale", 2.0}}));  // however 2 is written
  EXPECT_THROW(stored.require_method("lora", {{"scale", 2}}), UserError);
  EXPECT_THROW(stored.require_method("spp", {{"scale", 1}}), UserError);
  EXPECT_THROW(stored.require_method("spp", {{"scale", 2}, {"beta", true}}), UserError);
  EXPECT_NO_THROW(stored.require_base("sum", "here"));
  try {
    stored.require_base("other", "here");
    FAIL();
  } catch (const UserError& error) {
    EXPECT_NE(std::string(error.what()).find("sum"), std::string::npos);
    EXPECT_NE(std::string(error.what()).find("other"), std::string::npos);
  }
  Tiny more("adapters_more", 0, {"v_proj", "q_proj"}), fewer("adapters_fewer", 0, {"q_proj"});
  EXPECT_THROW(stored.copy_into(*more.parameters, more.model), UserError);
  EXPECT_THROW(stored.copy_into(*fewer.parameters, fewer.model), UserError);
}

}  // namespace
}  // namespace espalier::retrain
