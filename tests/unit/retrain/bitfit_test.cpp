#include "tests/unit/retrain/method_checks.h"

namespace espalier::retrain {
namespace {

TEST(Bitfit, TrainsBiasesAndNothingElse) {
  const auto method = configured({"retrain=bitfit"});
  EXPECT_FALSE(method->adapts_matrices());
  EXPECT_EQ(method->trainable_parameters(12, 8), 12);
  using Kind = Site::Kind;
  for (const Kind kind : {Kind::bias, Kind::norm_bias})
    EXPECT_TRUE(method->trains({kind, "some.bias", 0, {12}}));
  for (const Kind kind : {Kind::norm_weight, Kind::embedding, Kind::head})
    EXPECT_FALSE(method->trains({kind, "some.weight", 0, {12}}));
}

TEST(Bitfit, TheNormsBiasesCanBeLeftOut) {
  const auto method = configured({"retrain=bitfit", "retrain.norms=false"});
  EXPECT_TRUE(method->trains({Site::Kind::bias, "some.bias", 0, {12}}));
  EXPECT_FALSE(method->trains({Site::Kind::norm_bias, "norm.bias", 0, {12}}));
  expect_refused({"retrain=bitfit", "retrain.norms=some"}, {"retrain.norms"});
}

}  // namespace
}  // namespace espalier::retrain
