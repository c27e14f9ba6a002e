#include "stages/prune/method.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "pipeline/config/compose.h"
#include "pipeline/errors.h"
#include "stages/prune/options.h"

namespace espalier::prune {
namespace {

struct Configured {
  std::unique_ptr<PruningMethod> method;
  Options options;
};

/// Reads the prune section of a composed configuration as the stage does.
Configured read(std::vector<std::string> overrides) {
  const auto directory = std::filesystem::path(ESPALIER_SOURCE_DIR) / "configs";
  const config::Section section =
      config::compose({directory, "default", std::move(overrides)}).root().child("prune");
  Configured configured{make_method(section), read_options(section)};
  for (const Pattern& pattern : configured.options.patterns()) configured.method->check(pattern);
  section.finish();
  return configured;
}

void expect_refused(std::vector<std::string> overrides, const std::vector<std::string>& parts) {
  std::string text = "accepted";
  try {
    read(std::move(overrides));
  } catch (const UserError& error) {
    text = error.what();
  }
  for (const std::string& part : parts) EXPECT_NE(text.find(part), std::string::npos) << text;
}

model::Architecture two_blocks() {
  model::Architecture architecture;
  architecture.blocks = 2;
  architecture.block_prefix = "model.layers.";
  architecture.linears = {
      {model::kQuery, model::kAttentionInput, "self_attn.q_proj", 8, 8},
      {model::kKey, model::kAttentionInput, "self_attn.k_proj", 8, 8},
      {model::kDown, model::kFeedForwardMiddle, "mlp.down_proj", 8, 12},
  };
  return architecture;
}

TEST(Methods, EachReadsItsOwnKeysAndSaysWhatItNeeds) {
  EXPECT_FALSE(read({"prune=magnitude"}).method->needs().any());
  EXPECT_TRUE(read({"prune=wanda", "prune.variant=true"}).method->needs().norms);
  EXPECT_TRUE(read({"prune=sparsegpt", "prune.block_size=64"}).method->needs().gram);
  EXPECT_TRUE(read({"prune=alps", "prune.iterations=5"}).method->moves_weights());
}

TEST(Methods, AKeyThatTheMethodDoesNotReadIsRefusedByThoseThatDo) {
  expect_refused({"prune=magnitude", "+prune.variant=true"},
                 {"prune.variant", "magnitude", "wanda"});
  expect_refused({"prune=wanda", "+prune.rho=0.2"}, {"prune.rho", "wanda", "alps"});
  expect_refused({"prune=wanda", "prune.criterion=delta"}, {"prune.criterion", "wanda", "null"});
  expect_refused({"prune=wanda", "prune.heads=2"}, {"prune.heads", "wanda", "null"});
  expect_refused({"prune=wanda", "prune.method=alp"}, {"prune.method", "alps"});
}

TEST(Methods, DseeReadsItsCriterionAndRefusesWhatItsGlobalThresholdContradicts) {
  for (const char* criterion : {"delta", "merged", "magnitude", "random", "null"})
    EXPECT_FALSE(
        read({"prune=dsee", std::string("prune.criterion=") + criterion}).method->needs().any());
  expect_refused({"prune=dsee", "prune.criterion=largest"}, {"prune.criterion", "merged"});
  expect_refused({"prune=dsee", "prune.pattern=2:4"}, {"prune.pattern", "2:4", "unstructured"});
  expect_refused({"prune=dsee", "prune.allocation=owl"}, {"prune.allocation", "uniform"});
  expect_refused({"prune=dsee", "prune.overrides=[{match: '*', sparsity: 0.3}]"},
                 {"prune.overrides", "skip"});
}

TEST(Methods, PatternsThatTheyCannotFollowAreRefused) {
  expect_refused({"prune=sparsegpt", "prune.pattern=2:3"}, {"prune.block_size", "128", "3"});
  expect_refused({"prune=sparsegpt", "prune.overrides=[{match: q_proj, pattern: '2:3'}]"},
                 {"prune.block_size", "128", "3"});
  expect_refused({"prune=wanda", "prune.variant=true", "prune.pattern=2:4"},
                 {"prune.variant", "2:4"});
  expect_refused({"prune=wanda", "prune.allocation=owl", "prune.pattern=2:4"},
                 {"prune.allocation", "owl", "2:4"});
}

TEST(Methods, ValuesOutOfRangeAreRefusedAtTheirKey) {
  expect_refused({"prune=alps", "prune.rho=0"}, {"prune.rho", "0"});
  expect_refused({"prune=alps", "prune.iterations=0"}, {"prune.iterations", "0"});
  expect_refused({"prune=wanda", "prune.refit_steps=0"}, {"prune.refit_steps", "0"});
  expect_refused({"prune=wanda", "prune.dsnot.skip=attention"}, {"prune.dsnot.skip", "mlp"});
  expect_refused({"prune=wanda", "prune.dsnot.cycles=0"}, {"prune.dsnot.cycles", "0"});
  expect_refused({"prune=wanda", "prune.owl.span=2"}, {"prune.owl.span", "2"});
  expect_refused({"prune=wanda", "prune.tokens=some"}, {"prune.tokens", "loss_mask"});
}

TEST(Overrides, TheFirstMatchWinsAndSkippedMatricesStayDense) {
  const LayerChoice choice =
      read({"prune=wanda", "prune.sparsity=0.6",
            "prune.overrides=[{match: '*.1.*.q_proj', skip: true}, {match: q_proj, sparsity: 0.3},"
            " {match: '*proj', pattern: '2:4'}]",
            "prune.exclude=[k_proj]"})
          .options.layers;
  const model::Architecture architecture = two_blocks();
  require_layers(choice, architecture);
  const auto first = planned_layers(choice, architecture, 0),
             second = planned_layers(choice, architecture, 1);
  ASSERT_EQ(first.size(), 2u);
  EXPECT_EQ(first[0].linear.role, model::kQuery);
  EXPECT_EQ(first[0].pattern.sparsity, 0.3);
  EXPECT_TRUE(first[0].pattern.unstructured());
  EXPECT_EQ(first[1].pattern.name(), "2:4");
  ASSERT_EQ(second.size(), 1u);
  EXPECT_EQ(second[0].linear.role, model::kDown);
}

TEST(Overrides, ALayerOutsideOfTheBlocksIsChosenByItsName) {
  const std::string weight = "bert.pooler.dense.weight";
  const auto choice = [](const std::string& key) {
    return read({"prune=dsee", key}).options.layers;
  };
  EXPECT_TRUE(chooses(choice("prune.exclude=[dense]"), weight));  // "output.dense" of the blocks
  EXPECT_FALSE(chooses(choice("prune.exclude=[pooler.dense]"), weight));
  EXPECT_FALSE(chooses(choice("prune.overrides=[{match: '*pooler*', skip: true}]"), weight));
  EXPECT_FALSE(chooses(choice("prune.include=[q_proj]"), weight));
  EXPECT_TRUE(chooses(choice("prune.include=[bert.pooler.*]"), weight));
  require_layers(choice("prune.exclude=[pooler.dense]"), two_blocks(), weight);
  EXPECT_THROW(require_layers(choice("prune.exclude=[pooler.dense]"), two_blocks()), UserError);
}

TEST(Overrides, WhatMatchesNothingOrSaysNothingIsRefused) {
  const auto choice = [](const std::string& overrides) {
    return read({"prune=wanda", "prune.overrides=" + overrides}).options.layers;
  };
  EXPECT_THROW(require_layers(choice("[{match: '*.qproj', skip: true}]"), two_blocks()), UserError);
  EXPECT_THROW(require_layers(choice("[{match: q_proj, pattern: '2:5'}]"), two_blocks()),
               UserError);
  expect_refused({"prune.overrides=[{match: q_proj}]"}, {"prune.overrides.0.match", "skip"});
  expect_refused({"prune.overrides=[{match: q_proj, skip: true, sparsity: 0.5}]"}, {"skip"});
  expect_refused({"prune.overrides=[{match: q_proj, sparsity: 1}]"}, {"sparsity", "[0, 1)"});
  expect_refused({"prune.overrides=[{match: q_proj, pattern: '2:4', sparsity: 0.7}]"},
                 {"sparsity", "0.7", "2:4"});
  expect_refused({"prune.overrides=[{match: q_proj, skp: true, sparsity: 0.5}]"}, {"skp"});
}

}  // namespace
}  // namespace espalier::prune
