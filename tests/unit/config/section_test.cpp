#include "pipeline/config/section.h"

#include <gtest/gtest.h>

#include "tests/unit/config/files.h"

namespace espalier::config {
namespace {

const char* kConfig =
    "prune:\n"
    "  method: wanda\n"
    "  sparsity: 1.2\n"
    "  pattern: 2:4\n"
    "  samples: 128\n"
    "  refit: false\n"
    "  include: ['*.q_proj', '*.k_proj']\n"
    "  betas: [0.9, 1.5]\n"
    "  heads: null\n"
    "  path: ???\n"
    "  again: ${prune.path}\n"
    "  overrides:\n"
    "  - {match: a, sparsity: 0.5}\n"
    "  - {match: b, skipp: true}\n"
    "tasks:\n"
    "  text: {kind: perplexity, data: a.h5}\n"
    "  more: {kind: perplexity}\n"
    "  off: null\n";

struct SectionTest : testing::Test {
  Files files{{{"default.yaml", kConfig}}};
  Section prune = files.compose().root().child("prune");
  std::string at(int line) {
    return files.file("default.yaml") + ":" + std::to_string(line) + ": ";
  }
};

TEST_F(SectionTest, GivesTypedValues) {
  EXPECT_EQ(prune.text("method"), "wanda");
  EXPECT_EQ(prune.integer("samples"), 128);
  EXPECT_EQ(prune.number("samples"), 128.0);
  EXPECT_EQ(prune.number("sparsity"), 1.2);
  EXPECT_FALSE(prune.flag("refit"));
  EXPECT_EQ(prune.texts("include"), (std::vector<std::string>{"*.q_proj", "*.k_proj"}));
  EXPECT_EQ(prune.choice("method", {"magnitude", "wanda"}), "wanda");
  EXPECT_EQ(prune.path(), "prune");
}

TEST_F(SectionTest, NullAndAbsentAreTheSameForOptionalReads) {
  EXPECT_TRUE(prune.has("heads"));
  EXPECT_FALSE(prune.has("nothing"));
  EXPECT_TRUE(prune.is_null("heads"));
  EXPECT_TRUE(prune.is_null("nothing"));
  EXPECT_EQ(prune.optional_integer("heads"), std::nullopt);
  EXPECT_EQ(prune.optional_text("nothing"), std::nullopt);
  EXPECT_EQ(prune.integer_or("heads", 3), 3);
  EXPECT_EQ(prune.number_or("nothing", 0.5), 0.5);
  EXPECT_TRUE(prune.flag_or("nothing", true));
  EXPECT_EQ(prune.text_or("nothing", "x"), "x");
  EXPECT_EQ(prune.optional_integer("samples"), 128);
}

TEST_F(SectionTest, AValueOutOfRangeIsPlacedAtItsFileAndLine) {
  EXPECT_EQ(refusal([&] { prune.number("sparsity", {.low = 0, .high = 1, .high_open = true}); }),
            at(3) + "prune.sparsity: 1.2 is outside [0, 1)");
  EXPECT_EQ(refusal([&] { prune.integer("samples", {.low = 200}); }),
            at(5) + "prune.samples: 128 is outside [200, inf)");
  EXPECT_EQ(refusal([&] { prune.numbers("betas", {.low = 0, .high = 1}); }),
            at(8) + "prune.betas: 1.5 is outside [0, 1]");
}

TEST_F(SectionTest, AValueOfTheCommandLineIsPlacedThere) {
  Section changed = files.compose({"prune.sparsity=-0.5"}).root().child("prune");
  EXPECT_EQ(refusal([&] { changed.number("sparsity", {.low = 0}); }),
            "command line: prune.sparsity=-0.5: prune.sparsity: -0.5 is outside [0, inf)");
}

TEST_F(SectionTest, AnUnquotedPatternIsAnIntegerAndTheMessageSaysSo) {
  std::string message = refusal([&] { prune.text("pattern"); });
  EXPECT_TRUE(message.starts_with(at(4) + "prune.pattern: 124 is no text")) << message;
  EXPECT_NE(message.find("\"2:4\""), std::string::npos);
  EXPECT_EQ(files.compose({"prune.pattern=2:4"}).root().child("prune").text("pattern"), "2:4");
}

TEST_F(SectionTest, AChoiceNamesTheLegalValuesAndTheNearest) {
  EXPECT_EQ(
      refusal([&] {
        prune.choice("method", {"magnitude", "wands", "sparsegpt"});
      }),
      at(2) +
          "prune.method: \"wanda\" is not one of magnitude, wands, sparsegpt; did you mean wands?");
}

TEST_F(SectionTest, AMandatoryValueIsAnErrorOnlyWhenItIsRead) {
  EXPECT_TRUE(refusal([&] {
                prune.text("path");
              }).starts_with(at(10) + "prune.path: mandatory and not set"));
  std::string through = refusal([&] { prune.text("again"); });
  EXPECT_NE(through.find("prune.path=VALUE"), std::string::npos) << through;
}

TEST_F(SectionTest, AMissingKeyStatesWhatIsExpected) {
  EXPECT_EQ(refusal([&] { prune.integer("unit", {.low = 1}); }),
            at(2) + "prune.unit: the key is missing; expected an integer in [1, inf)");
  EXPECT_EQ(refusal([&] { prune.text("heads"); }), at(9) + "prune.heads: null; expected a text");
  EXPECT_EQ(refusal([&] { prune.flag("samples"); }),
            at(5) + "prune.samples: 128 is neither true nor false");
}

TEST_F(SectionTest, FinishRefusesTheFirstUnreadKeyWithTheNearestKnownOne) {
  Section section = files.compose({"+prune.sparsty=0.5"}).root().child("prune");
  section.allow({"method", "sparsity", "pattern", "samples", "refit", "include", "betas", "heads",
                 "path", "again", "overrides"});
  EXPECT_EQ(
      refusal([&] { section.finish(); }),
      "command line: +prune.sparsty=0.5: prune.sparsty: unknown key; did you mean prune.sparsity?");
}

TEST_F(SectionTest, FinishCoversItemsAndChildren) {
  std::vector<Section> items = prune.items("overrides");
  ASSERT_EQ(items.size(), 2u);
  for (const auto& item : items) {
    EXPECT_FALSE(item.text("match").empty());
    item.optional_number("sparsity");
    item.flag_or("skip", false);
  }
  prune.allow({"method", "sparsity", "pattern", "samples", "refit", "include", "betas", "heads",
               "path", "again"});
  EXPECT_EQ(refusal([&] { prune.finish(); }),
            at(14) + "prune.overrides.1.skipp: unknown key; did you mean prune.overrides.1.skip?");
}

TEST_F(SectionTest, ChildrenComeInTheOrderOfTheFileWithoutTheOnesSwitchedOff) {
  Section root = files.compose().root();
  auto tasks = root.children("tasks");
  ASSERT_EQ(tasks.size(), 2u);
  EXPECT_EQ(tasks[0].first, "text");
  EXPECT_EQ(tasks[1].first, "more");
  EXPECT_EQ(tasks[0].second.path(), "tasks.text");
  EXPECT_EQ(tasks[0].second.text("data"), "a.h5");
}

using Listed = std::vector<std::pair<std::string, std::string>>;

TEST_F(SectionTest, CanonicalTextSortsKeysAndDoesNotChangeWithTheOrderOfTheFile) {
  Files one(Listed{{"default.yaml", "s: {b: 1, a: [1.0, x], c: {e: null, d: true}}\n"}});
  Files two(Listed{{"default.yaml", "s: {c: {d: true, e: null}, a: [1.0, x], b: 1}\n"}});
  std::string text = one.compose().root().child("s").canonical();
  EXPECT_EQ(text, R"({"a":[1.0,"x"],"b":1,"c":{"d":true,"e":null}})");
  EXPECT_EQ(two.compose().root().child("s").canonical(), text);
}

TEST_F(SectionTest, FailPlacesTheMessageAtTheKey) {
  EXPECT_EQ(refusal([&] { prune.fail("pattern", "contradicts sparsity"); }),
            at(4) + "prune.pattern: contradicts sparsity");
}

}  // namespace
}  // namespace espalier::config
