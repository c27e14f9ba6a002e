#include "stages/retrain/options.h"

#include <gtest/gtest.h>

#include "pipeline/config/compose.h"
#include "pipeline/errors.h"
#include "stages/retrain/adapter.h"

namespace espalier::retrain {
namespace {

/// Reads the retrain section of a composed configuration as the stage does.
RetrainOptions read(std::vector<std::string> overrides, const std::string& name = "default") {
  const auto directory = std::filesystem::path(ESPALIER_SOURCE_DIR) / "configs";
  const config::Section section =
      config::compose({directory, name, std::move(overrides)}).root().child("retrain");
  const RetrainOptions options = read_options(section);
  make_adapter_method(options.method, section);
  section.finish();
  return options;
}

std::string refusal(std::vector<std::string> overrides) {
  try {
    read(std::move(overrides));
  } catch (const UserError& error) {
    return error.what();
  }
  return "accepted";
}

void expect_refused(std::vector<std::string> overrides, const std::vector<std::string>& parts) {
  const std::string text = refusal(std::move(overrides));
  for (const std::string& part : parts) EXPECT_NE(text.find(part), std::string::npos) << text;
}

TEST(RetrainOptions, TheShippedConfigurationIsThePublishedRecipe) {
  const RetrainOptions options = read({});
  EXPECT_EQ(options.method, "spp");
  EXPECT_EQ(options.targets.size(), 7u);
  EXPECT_EQ(options.batch_size, 128);
  EXPECT_EQ(options.learning_rate, 4e-3);
  EXPECT_EQ(options.adamw.weight_decay, 0.001);
  EXPECT_EQ(options.adamw.beta2, 0.999);
  EXPECT_EQ(options.warmup_ratio, 0.03);
  EXPECT_EQ(options.total_steps(50000), 1172);  // 3 epochs of 50000 examples, 128 a step
  EXPECT_EQ(read({"retrain.steps=7"}).total_steps(50000), 7);
}

TEST(RetrainOptions, ContradictionsAreRefusedAtTheirKey) {
  expect_refused({"retrain.micro_batch_size=3"},
                 {"retrain.batch_size", "128", "micro_batch_size = 3"});
  expect_refused({"retrain.warmup_steps=10"}, {"retrain.warmup_steps", "warmup_ratio"});
  expect_refused({"retrain.epochs=null"}, {"retrain.steps", "epochs"});
  expect_refused({"retrain.schedule=exponential"},
                 {"retrain.schedule", "linear, cosine, constant"});
  expect_refused({"retrain.dropout=1.0"}, {"retrain.dropout", "[0, 1)"});
  expect_refused({"retrain.method=sp"}, {"retrain.method", "'sp'", "spp"});
  expect_refused({"retrain.init=ones"}, {"retrain.init", "zero, random"});
  expect_refused({"+retrain.row_group=8"}, {"row_group", "row_groups"});
}

TEST(RetrainOptions, WhatIsNotCarriedOutIsRefusedInsteadOfIgnored) {
  expect_refused({"retrain.adapter=previous"}, {"retrain.adapter", "previous"});
  expect_refused({"retrain.merge=beside"}, {"retrain.merge", "beside"});
  expect_refused({"retrain.validate.share=0.1"}, {"retrain.validate.share", "not supported"});
}

}  // namespace
}  // namespace espalier::retrain
