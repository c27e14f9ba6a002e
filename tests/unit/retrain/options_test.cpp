#include "stages/retrain/options.h"

#include <gtest/gtest.h>

#include <algorithm>

#include "pipeline/config/compose.h"
#include "pipeline/errors.h"
#include "stages/retrain/adapter.h"
#include "tests/unit/retrain/configured_method.h"

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
  expect_refused({"retrain.residual=false", "retrain.init=random"}, {"retrain.init", "ones"});
  expect_refused({"+retrain.row_group=8"}, {"row_group", "row_groups"});
}

TEST(RetrainOptions, AStartAndAValidationThatContradictThemselvesAreRefused) {
  expect_refused({"retrain.adapter=older"}, {"retrain.adapter", "new, previous"});
  expect_refused({"retrain.adapter=previous", "retrain.adapter_from=a.h5"},
                 {"retrain.adapter_from", "previous"});
  expect_refused({"retrain.steps=0"}, {"retrain.steps", "adapter_from"});
  expect_refused({"retrain.merge=sideways"}, {"retrain.merge", "masked, beside, dense"});
  expect_refused({"retrain.validate.share=1.5"}, {"retrain.validate.share", "(0, 1)"});
  expect_refused({"retrain.validate.share=0.1", "retrain.validate.data=v.h5"},
                 {"retrain.validate.share", "validate.data"});
  expect_refused({"retrain.validate.every=hour"}, {"retrain.validate.every", "epoch"});
  expect_refused({"retrain.validate.keep=first"}, {"retrain.validate.keep", "best, last"});
  expect_refused({"retrain.validate.patience=3"}, {"retrain.validate.patience", "share"});
}

TEST(RetrainOptions, ValidationIsReadWithItsDefaults) {
  EXPECT_FALSE(read({}).validate.wanted());
  const ValidateOptions validate =
      read({"retrain.validate.share=0.1", "retrain.validate.patience=3"}).validate;
  EXPECT_EQ(validate.share, 0.1);
  EXPECT_FALSE(validate.every_steps.has_value());
  EXPECT_TRUE(validate.keep_best);
  EXPECT_EQ(validate.patience, 3);
  EXPECT_EQ(read({"retrain.validate.share=0.1", "retrain.validate.every=50"}).validate.every_steps,
            50);
}

TEST(RetrainOptions, OnlyWhatTheParametersMeanBelongsToTheirSettings) {
  const auto settings = [](const std::string& key) { return configured({key})->settings(); };
  EXPECT_EQ(settings("retrain.dropout=0.3"), settings("retrain.init=random"));
  EXPECT_EQ(settings("retrain.learning_rate=0.1"), settings("retrain.steps=3"));
  EXPECT_NE(settings("retrain.scale=3"), settings("retrain.dropout=0.3"));
}

TEST(RetrainOptions, SettingsAreTheValuesThatWereReadHoweverTheyAreWritten) {
  for (const std::string& method : adapter_names()) {
    // Every key of the settings is one that the method reads.
    const std::vector<std::string> keys = adapter_keys(method);
    const nlohmann::json settings = configured({"retrain=" + method})->settings();
    for (const auto& [key, value] : settings.items())
      EXPECT_NE(std::find(keys.begin(), keys.end(), key), keys.end()) << method << " " << key;
  }
  const auto lora = [](std::vector<std::string> more) {
    more.insert(more.begin(), "retrain=lora");
    return configured(more)->settings();
  };
  EXPECT_EQ(lora({"retrain.alpha=16"}), lora({"retrain.alpha=16.0"}));
  EXPECT_EQ(lora({"~retrain.alpha"}), lora({}));
  EXPECT_NE(lora({"retrain.alpha=17"}), lora({}));
}

}  // namespace
}  // namespace espalier::retrain
