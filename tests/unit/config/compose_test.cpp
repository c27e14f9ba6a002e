#include "pipeline/config/compose.h"

#include <gtest/gtest.h>

#include "tests/unit/config/files.h"

namespace espalier::config {
namespace {

const std::vector<std::pair<std::string, std::string>> kGroups = {
    {"default.yaml", "defaults:\n- prune: wanda\n- _self_\nrun: {name: a, seed: 0}\n"},
    {"prune/wanda.yaml", "method: wanda\nsparsity: 0.5\n"},
    {"prune/sparsegpt.yaml", "method: sparsegpt\nsparsity: 0.5\n"},
};

std::string message_of(const std::vector<std::string>& overrides) {
  Files files(kGroups);
  return refusal([&] { files.compose(overrides); });
}

std::string message_of_file(const std::string& text) {
  Files files({{"default.yaml", text}});
  std::string message = refusal([&] { files.compose().json(true); });
  std::string name = files.file("default.yaml");
  return message.starts_with(name) ? message.substr(name.size()) : message;
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(Compose, AMisspeltKeyNamesTheOverrideAndTheNearestKey) {
  EXPECT_EQ(message_of({"prune.sparsty=0.7"}),
            "command line: prune.sparsty=0.7: there is no key prune.sparsty; did you mean "
            "prune.sparsity?; "
            "to add a new one: +prune.sparsty=0.7");
}

TEST(Compose, AMisspeltChoiceNamesTheNearestChoice) {
  std::string message = message_of({"prune=sparsegtp"});
  EXPECT_TRUE(contains(message, "command line: prune=sparsegtp: there is no prune/sparsegtp.yaml"))
      << message;
  EXPECT_TRUE(contains(message, "did you mean sparsegpt?")) << message;
}

TEST(Compose, AMisspeltChoiceInAFileNamesTheLine) {
  Files files(
      {{"default.yaml", "a: 1\ndefaults:\n- prune: wnada\n"}, {"prune/wanda.yaml", "b: 1\n"}});
  std::string message = refusal([&] { files.compose(); });
  EXPECT_TRUE(message.starts_with(files.file("default.yaml") + ":3: there is no prune/wnada.yaml"))
      << message;
  EXPECT_TRUE(contains(message, "did you mean wanda?")) << message;
}

TEST(Compose, AMisspeltRunNamesTheNearestRun) {
  Files files(kGroups);
  std::string message = refusal([&] { compose({files.directory, "defualt", {}}); });
  EXPECT_TRUE(contains(message, "there is no configuration defualt; did you mean default?"))
      << message;
}

TEST(Compose, AMissingDirectoryIsNamed) {
  EXPECT_TRUE(contains(refusal([] {
                         compose({"/nowhere/at/all", "default", {}});
                       }),
                       "/nowhere/at/all: no such directory"));
}

TEST(Compose, ASweepOutsideMultirunSaysSo) {
  EXPECT_TRUE(contains(message_of({"prune=wanda,sparsegpt"}), "--multirun"));
}

TEST(Compose, FilesWithErrorsAreRefusedWithTheLine) {
  EXPECT_EQ(message_of_file("a: 1\nb: 2\na: 3\n"), ":3: duplicate key a");
  EXPECT_TRUE(message_of_file("a: 1\nb: [1, 2\n").starts_with(":"))
      << message_of_file("a: 1\nb: [1, 2\n");
  EXPECT_TRUE(
      message_of_file("a: 1\nb: ${a\n").starts_with(":2: \"${a\" is not a valid interpolation"));
  EXPECT_TRUE(message_of_file("a: 1\nb: ${c.d}\n").starts_with(":2: ${c.d}: there is no c"));
  EXPECT_EQ(message_of_file("3\n"), ":1: a configuration is a mapping of keys, found 3");
  EXPECT_TRUE(contains(message_of_file("model: {path: x}\nb: ${model.paht}\n"),
                       "did you mean model.path?"));
}

TEST(Compose, CyclesOfInterpolationsEnd) {
  EXPECT_TRUE(contains(message_of_file("a: ${b}\nb: ${c}\nc: ${a}\n"), "refers to itself"));
  EXPECT_TRUE(contains(message_of_file("a: {b: '${a}'}\n"), "contains itself"));
  EXPECT_TRUE(contains(message_of_file("a: x${a}\n"), "refers to itself"));
}

TEST(Compose, LongChainsOfInterpolationsEnd) {
  std::string text = "a0: 1\n";
  for (int i = 1; i < 200; ++i)
    text = "a" + std::to_string(i) + ": ${a" + std::to_string(i - 1) + "}\n" + text;
  EXPECT_TRUE(contains(message_of_file(text), "in a row"));
}

TEST(Compose, ExpandingInterpolationsAreBounded) {
  std::string strings = "a0: xxxxxxxxxxxxxxxx\n", lists = "a0: [1, 1]\n";
  for (int i = 1; i < 60; ++i) {
    std::string before = "${a" + std::to_string(i - 1) + "}", name = "a" + std::to_string(i);
    strings += name + ": " + before + before + "\n";
    lists += name + ": ['" + before + "', '" + before + "']\n";
  }
  EXPECT_TRUE(contains(message_of_file(strings), "16 MiB"));
  EXPECT_TRUE(contains(message_of_file(lists), "200000 values"));
}

TEST(Compose, AliasBombsAreBounded) {
  std::string text = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n";
  for (int i = 1; i < 12; ++i) {
    std::string before = "*a" + std::to_string(i - 1), name = "a" + std::to_string(i);
    text += name + ": &" + name + " [" + before;
    for (int j = 0; j < 9; ++j) text += ", " + before;
    text += "]\n";
  }
  EXPECT_TRUE(contains(message_of_file(text), "200000 values"));
}

TEST(Compose, DepthIsBoundedEverywhere) {
  EXPECT_TRUE(contains(message_of_file("a: " + std::string(400, '[') + std::string(400, ']')),
                       "64 levels"));
  EXPECT_FALSE(message_of_file("a: " + std::string(100000, '[')).empty());
  std::string nested = std::string(1000, '[') + std::string(1000, ']');
  EXPECT_TRUE(contains(message_of({"+a=" + nested}), "64 levels"));
  std::string interpolation = "a: '${oc.create:" + nested + "}'\n";
  EXPECT_TRUE(contains(message_of_file(interpolation), "64 levels"));
  std::string names = "a: '";
  for (int i = 0; i < 1000; ++i) names += "${";
  EXPECT_FALSE(message_of_file(names + "'\n").empty());
}

TEST(Compose, LargeFilesAreRefused) {
  EXPECT_TRUE(contains(message_of_file("a: " + std::string(5 << 20, 'x') + "\n"), "has at most"));
}

TEST(Compose, DefaultsListsThatIncludeEachOtherEnd) {
  Files files({{"default.yaml", "defaults: [other]\n"}, {"other.yaml", "defaults: [default]\n"}});
  EXPECT_TRUE(contains(refusal([&] { files.compose(); }), "without end"));
}

TEST(Compose, HydrasOwnKeysAreRefusedWithAWayOut) {
  EXPECT_TRUE(contains(message_of({"hydra.run.dir=x"}), "run.dir"));
}

TEST(Compose, ResolvedOutputNamesWhatIsMandatory) {
  EXPECT_TRUE(contains(message_of_file("a: ???\nb: ${a}\n"),
                       ":2: ${a}: it refers to a, which is mandatory"));
}

TEST(Compose, HelpListsGroupsTheirChoicesAndTheKeys) {
  Files files(kGroups);
  std::string text = describe_groups(files.directory);
  EXPECT_TRUE(contains(text, "prune: sparsegpt, wanda")) << text;
  EXPECT_TRUE(contains(text, "  seed: 0")) << text;
}

TEST(Sweep, IsTheProductWithTheLastOverrideFastest) {
  Files files(kGroups);
  auto members = expand_sweep(
      {files.directory, "default", {"prune=glob(*)", "run.seed=range(0,2)", "run.name=b"}});
  std::vector<std::vector<std::string>> expected = {{"prune=sparsegpt", "run.seed=0", "run.name=b"},
                                                    {"prune=sparsegpt", "run.seed=1", "run.name=b"},
                                                    {"prune=wanda", "run.seed=0", "run.name=b"},
                                                    {"prune=wanda", "run.seed=1", "run.name=b"}};
  EXPECT_EQ(members, expected);
}

TEST(Sweep, WithoutSweepSyntaxHasOneMember) {
  Files files(kGroups);
  EXPECT_EQ(expand_sweep({files.directory, "default", {"run.seed=1"}}).size(), 1u);
  EXPECT_EQ(expand_sweep({files.directory, "default", {}}).size(), 1u);
}

TEST(Sweep, SizeIsBounded) {
  Files files(kGroups);
  EXPECT_TRUE(
      contains(refusal([&] {
                 expand_sweep({files.directory, "default", {"+a=range(200)", "+b=range(200)"}});
               }),
               "more than 10000 members"));
  EXPECT_TRUE(contains(refusal([&] {
                         expand_sweep({files.directory, "default", {"+a=range(1000000000)"}});
                       }),
                       "more than 10000 members"));
}

TEST(Sweep, MembersComposeAgain) {
  Files files(kGroups);
  for (const auto& member : expand_sweep(
           {files.directory, "default", {"run.name='a b','c,d',e:f", "+x=[1,{a: b c}],''"}})) {
    EXPECT_EQ(refusal([&] { files.compose(member).json(true); }), "");
  }
}

TEST(Sweep, ShuffleIsTheSameEveryTimeSoThatASweepCanBeResumed) {
  Files files(kGroups);
  Request request{files.directory, "default", {"run.seed=shuffle(1,2,3,4,5,6,7)"}};
  EXPECT_EQ(expand_sweep(request), expand_sweep(request));
  EXPECT_EQ(expand_sweep(request).size(), 7u);
}

}  // namespace
}  // namespace espalier::config
