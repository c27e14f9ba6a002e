#include "pipeline/driver/units.h"

#include <gtest/gtest.h>

namespace espalier::driver {
namespace {

struct Told {
  int64_t total = -1, done = -1;
  std::vector<int64_t> advanced, units;
};

Told carry_out(std::vector<int64_t> done, bool count_done) {
  Told told;
  Workers workers(1);
  const Hooks hooks{[&](const std::string&, int64_t total, int64_t finished) {
                      told.total = total;
                      told.done = finished;
                    },
                    [&](int64_t finished) { told.advanced.push_back(finished); },
                    [] { return false; }};
  carry_out_units(
      "matrices", {1, 3, 2}, std::move(done), comm::Communicator::self(), workers, hooks,
      [&](int64_t unit) { told.units.push_back(unit); }, count_done);
  return told;
}

TEST(Units, WhatAnEarlierStartFinishedCountsAsDone) {
  const Told told = carry_out({0, 1, 0}, true);
  EXPECT_EQ(told.total, 3);
  EXPECT_EQ(told.done, 1);
  EXPECT_EQ(told.advanced, std::vector<int64_t>{3});
  EXPECT_EQ(told.units, (std::vector<int64_t>{2, 0}));
}

TEST(Units, ALaterRoundTellsOfItsOwnUnitsOnly) {
  const Told told = carry_out({1, 1, 0}, false);
  EXPECT_EQ(told.total, 1);
  EXPECT_EQ(told.done, 0);
  EXPECT_EQ(told.advanced, std::vector<int64_t>{1});
  EXPECT_EQ(told.units, std::vector<int64_t>{2});
}

}  // namespace
}  // namespace espalier::driver
