#include "stages/prune/pattern.h"

#include <gtest/gtest.h>

#include "pipeline/errors.h"

namespace espalier::prune {
namespace {

TEST(Pattern, TwoOfFourKeepsTwoAndItsSparsityIsOneHalf) {
  const Pattern pattern = parse_pattern("2:4", 0.7);
  EXPECT_EQ(pattern.keep, 2);
  EXPECT_EQ(pattern.group, 4);
  EXPECT_EQ(pattern.sparsity, 0.5);
  EXPECT_EQ(pattern.name(), "2:4");
  EXPECT_EQ(parse_pattern("2:8", 0.5).sparsity, 0.75);
}

TEST(Pattern, UnstructuredTakesTheSparsityThatIsGiven) {
  const Pattern pattern = parse_pattern("unstructured", 0.7);
  EXPECT_TRUE(pattern.unstructured());
  EXPECT_EQ(pattern.sparsity, 0.7);
  EXPECT_EQ(pattern.name(), "unstructured");
}

TEST(Pattern, EveryOtherTextIsRefusedAndTheLegalFormsAreNamed) {
  for (const char* text : {"", "2", "4:2", "4:4", "0:4", "2:65", "2:4 ", "-1:4", "2:", ":4",
                           "2:4:8", "2.0:4", "Unstructured", "99999999999999999999:4"}) {
    try {
      parse_pattern(text, 0.5);
      ADD_FAILURE() << "accepted \"" << text << '"';
    } catch (const UserError& error) {
      EXPECT_NE(std::string(error.what()).find("K:M with 1 <= K < M <= 64"), std::string::npos);
    }
  }
}

}  // namespace
}  // namespace espalier::prune
