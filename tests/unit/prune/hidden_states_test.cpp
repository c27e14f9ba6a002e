#include "stages/prune/hidden_states.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "pipeline/errors.h"

namespace espalier::prune {
namespace {

namespace fs = std::filesystem;

class Spilled : public testing::Test {
 protected:
  void TearDown() override { fs::remove_all(directory_); }
  const fs::path directory_ = fs::path(testing::TempDir()) / "espalier-spilled";
};

TEST_F(Spilled, UnitsComeBackAsTheyWerePutAndLeaveNoFile) {
  HiddenStates states(3);
  const int64_t unit_bytes = 2 * 5 * 7 * 2;
  states.spill_to(directory_ / "state", unit_bytes);
  EXPECT_EQ(states.spilled_bytes(), 3 * unit_bytes);
  std::vector<at::Tensor> put;
  for (int64_t unit = 0; unit < 3; ++unit)  // the last unit is a smaller one
    put.push_back(at::randn({unit == 2 ? 5 : 10, 7}).to(at::kBFloat16));
  for (int64_t unit : {2, 0, 1}) states.put(unit, put[unit]);
  for (int64_t unit : {0, 1, 2}) {
    EXPECT_EQ(states.get(unit).scalar_type(), at::kBFloat16);
    EXPECT_TRUE(at::equal(states.get(unit), put[unit]));
  }
  states.put(1, put[0].t().reshape({7, 10}).t());  // not contiguous
  EXPECT_TRUE(at::equal(states.get(1), put[0].t().reshape({7, 10}).t()));
  EXPECT_TRUE(at::equal(states.get(0), put[0]));
  EXPECT_TRUE(fs::is_empty(directory_ / "state"));
  EXPECT_THROW(states.put(0, at::zeros({11, 7}, at::kBFloat16)), DefectError);
}

TEST_F(Spilled, ADirectoryThatCannotBeWrittenIsNamed) {
  HiddenStates states(1);
  try {
    states.spill_to("/proc/espalier", 8);
    ADD_FAILURE() << "accepted";
  } catch (const EnvironmentError& error) {
    EXPECT_NE(std::string(error.what()).find("/proc/espalier"), std::string::npos);
  }
}

TEST(MustSpill, OnlyAboveALimitThatIsSet) {
  EXPECT_FALSE(must_spill({int64_t{1} << 50, 0}, 0));
  EXPECT_FALSE(must_spill({60, 40}, 100));
  EXPECT_TRUE(must_spill({61, 40}, 100));
  EXPECT_TRUE(must_spill({1, 400}, 100));  // without the states it does not fit either
}

}  // namespace
}  // namespace espalier::prune
