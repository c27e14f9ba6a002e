#include "pipeline/driver/sweep_summary.h"

#include <gtest/gtest.h>

#include "pipeline/driver/text_table.h"
#include "pipeline/errors.h"

namespace espalier::driver {
namespace {

using nlohmann::json;

/// What read_figures() gives of a run with one task.
json reached(json accuracy, int64_t nonzeros) {
  return {{"tasks",
           {{"rte",
             {{"entry", "04-evaluate"},
              {"leading", "accuracy"},
              {"reported", {{"accuracy", accuracy}, {"f1", 0.5}}}}}}},
          {"figures", {{"nonzeros", nonzeros}, {"bytes", 44000000}}}};
}

SweepMember member(const std::string& rate, uint64_t seed) {
  return {{"model.path=/m", "retrain.learning_rate=" + rate, "run.seed=" + std::to_string(seed)},
          seed,
          "outputs/s-sweep/" + rate + "," + std::to_string(seed)};
}

TEST(SweepSummary, StatisticsAreThoseOfPythonsModule) {
  const Statistics three = statistics_of({0.61, 0.58, 0.66});
  EXPECT_EQ(three.median, 0.61);
  EXPECT_NEAR(three.mean, 0.6166666666666667, 1e-15);
  EXPECT_NEAR(*three.standard_deviation, 0.0404145188432738, 1e-15);
  const Statistics four = statistics_of({27.9, 27.5, 28.3, 27.84});
  EXPECT_DOUBLE_EQ(four.median, 27.869999999999997);
  EXPECT_DOUBLE_EQ(four.mean, 27.885);
  EXPECT_NEAR(*four.standard_deviation, 0.3279735761714148, 1e-14);
  // Far from 0 the squares of the differences count, not the difference of the squares.
  EXPECT_NEAR(*statistics_of({1e9 + 1, 1e9 + 2, 1e9 + 4}).standard_deviation, 1.5275252316519465,
              1e-9);
  EXPECT_FALSE(statistics_of({3.0}).standard_deviation.has_value());
  EXPECT_THROW(statistics_of({}), DefectError);
}

TEST(SweepSummary, MembersThatDifferInTheSeedAloneAreOneConfiguration) {
  const json summary = summarize({{member("1e-3", 0), reached(0.61, 10)},
                                  {member("1e-3", 1), reached(0.58, 12)},
                                  {member("1e-3", 2), reached(0.66, 11)},
                                  {member("5e-4", 0), reached(0.70, 10)}});
  EXPECT_EQ(summary["swept"], json({"retrain.learning_rate"}));
  ASSERT_EQ(summary["configurations"].size(), 2u);
  const json& first = summary["configurations"][0];
  EXPECT_EQ(first["settings"], json({{"retrain.learning_rate", "1e-3"}}));
  EXPECT_EQ(first["seeds"], json({0, 1, 2}));
  const json& accuracy = first["tasks"]["rte"]["reported"]["accuracy"];
  EXPECT_EQ(accuracy["values"], json({0.61, 0.58, 0.66}));
  EXPECT_EQ(accuracy["median"], 0.61);
  EXPECT_EQ(first["figures"]["nonzeros"]["median"], 11);
  const json& second = summary["configurations"][1];
  EXPECT_TRUE(second["tasks"]["rte"]["reported"]["accuracy"]["standard_deviation"].is_null());

  const auto table = table_of(summary);
  EXPECT_EQ(table[0], (std::vector<std::string>{"retrain.learning_rate", "seeds", "rte accuracy",
                                                "nonzeros", "bytes"}));
  EXPECT_EQ(table[1][2], "0.6100 (0.6167 ± 0.0404)");
  EXPECT_EQ(table[1][4], "44.0 MB");
  EXPECT_EQ(table[2][2], "0.7000");
}

TEST(SweepSummary, AMetricThatOneSeedDoesNotHaveIsCountedWithoutIt) {
  const json summary =
      summarize({{member("1e-3", 0), reached(0.6, 10)}, {member("1e-3", 1), reached(nullptr, 10)}});
  const json& accuracy = summary["configurations"][0]["tasks"]["rte"]["reported"]["accuracy"];
  EXPECT_EQ(accuracy["count"], 1);
  EXPECT_TRUE(accuracy["values"][1].is_null());
  EXPECT_EQ(table_of(summary)[1][1], "0.6000 (0.6000; 1 of 2)");
}

TEST(SweepSummary, TheCommaSeparatedFileQuotesWhatHoldsCommas) {
  SweepMember lists = member("1e-3", 0);
  lists.overrides.push_back("+retrain.targets=[q_proj,v_proj]");
  SweepMember words = member("1e-3", 1);
  words.overrides.push_back("+retrain.targets=q_proj");
  const std::string text = csv_of(summarize({{lists, reached(0.5, 1)}, {words, reached(0.6, 1)}}));
  EXPECT_EQ(text.substr(0, text.find(',')), "retrain.targets");
  EXPECT_NE(text.find("\n\"[q_proj,v_proj]\",0,1,0.5,0.5,,"), std::string::npos) << text;
}

TEST(TextTable, RowsThatDifferInTheirBlockAloneBecomeOne) {
  const std::vector<BlockRow> rows = {{0, "h.", ".q", {"2:4"}},
                                      {1, "h.", ".q", {"2:4"}},
                                      {2, "h.", ".q", {"4:8"}},
                                      {3, "h.", ".q", {"2:4"}},
                                      {0, "h.", ".v", {"2:4"}}};
  EXPECT_EQ(folded_rows(rows), (std::vector<std::vector<std::string>>{
                                   {"h.0-1,3.q", "2:4"}, {"h.2.q", "4:8"}, {"h.0.v", "2:4"}}));
}

TEST(TextTable, AColumnIsAsWideAsItsWidestCellOnTheScreen) {
  EXPECT_EQ(text_table({{"a", "b"}, {"1 ± 2", "3"}}, "  "), "  a      b\n  1 ± 2  3\n");
}

}  // namespace
}  // namespace espalier::driver
