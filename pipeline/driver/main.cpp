/// The espalier program: composes, runs, and turns every error into one message and an exit code.

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "pipeline/comm/communicator.h"
#include "pipeline/driver/command_line.h"
#include "pipeline/driver/run.h"
#include "pipeline/driver/signals.h"
#include "pipeline/driver/sweep_summary.h"
#include "pipeline/errors.h"
#include "pipeline/inspect/inspection.h"
#include "pipeline/inspect/status.h"
#include "pipeline/io/checksum.h"
#include "pipeline/linalg/product.h"
#include "stages/compress/decode.h"

namespace {

using namespace espalier;
using driver::CommandLine;

/// What changes no result names no directory: the same sweep started with other threads goes on.
bool changes_no_result(const std::string& key) {
  return key == "run.resume" || key == "run.dir" || key == "cluster" || key.starts_with("cluster.");
}

/// Where the members of a sweep lie.
std::filesystem::path sweep_directory(const config::Composition& member) {
  return fmt::format("outputs/{}-sweep", member.root().child("run").text("name"));
}

/// The overrides as the name of one directory: no slash in it, and 255 bytes at most.
std::string member_name(const config::Composition& member) {
  constexpr size_t kLongest = 255, kHash = 12;
  std::string name = member.override_dirname(changes_no_result);
  if (name.empty()) return "no-overrides";
  const std::string whole = name;
  std::replace(name.begin(), name.end(), '/', '_');
  if (name.size() > kLongest) {
    size_t end = kLongest - kHash - 1;
    while ((name[end] & 0xC0) == 0x80) --end;  // between two signs of UTF-8
    name = name.substr(0, end) + "~" + io::checksum(whole).substr(0, kHash);
  }
  return name;
}

/// In a sweep each member has a directory of its own, named by its overrides.
config::Composition compose_member(config::Request request,
                                   const std::vector<std::string>& overrides) {
  request.overrides = overrides;
  const config::Composition composition = config::compose(request);
  for (const auto& override : overrides)
    if (override.starts_with("run.dir="))
      throw UserError(
          fmt::format("{}: a sweep names the directories of its members itself: "
                      "outputs/<run.name>-sweep/<overrides>; set run.name instead",
                      override));
  // The name is itself the text of overrides, quotes among it.
  std::string quoted;
  for (const char c : member_name(composition)) {
    if (c == '\'' || c == '\\') quoted += '\\';
    quoted += c;
  }
  request.overrides.push_back(
      fmt::format("run.dir='{}/{}'", sweep_directory(composition).string(), quoted));
  return config::compose(request);
}

/// One configuration of a sweep.
struct Member {
  std::vector<std::string> overrides;
  config::Composition composition;
  std::filesystem::path directory;
};

/// In their order; overrides that change no result make no other member.
std::vector<Member> members_of(const config::Request& request) {
  std::vector<Member> members;
  std::set<std::filesystem::path> seen;
  for (const auto& overrides : config::expand_sweep(request)) {
    config::Composition composition = compose_member(request, overrides);
    const std::filesystem::path directory = composition.root().child("run").text("dir");
    if (seen.insert(directory).second)
      members.push_back({overrides, std::move(composition), directory});
  }
  return members;
}

/// All of them, or the one that --member names.
std::vector<Member> wanted_of(const std::vector<Member>& members, const CommandLine& line) {
  if (line.member == 0) return members;
  if (line.member > members.size())
    throw UserError(fmt::format("--member {}: the sweep has members 1 to {}; --members lists them",
                                line.member, members.size()));
  return {members[line.member - 1]};
}

driver::SweepMember summarized(const Member& member) {
  const config::Section run = member.composition.root().child("run");
  return {member.overrides, static_cast<uint64_t>(run.integer_or("seed", 0, {.low = 0})),
          member.directory};
}

/// By the directory that they lie in: several when run.name is swept.
std::map<std::filesystem::path, std::vector<driver::SweepMember>> by_sweep(
    const std::vector<Member>& members) {
  std::map<std::filesystem::path, std::vector<driver::SweepMember>> sweeps;
  for (const Member& member : members)
    sweeps[sweep_directory(member.composition)].push_back(summarized(member));
  return sweeps;
}

void write_summaries(const std::vector<Member>& members) {
  for (const auto& [directory, its_members] : by_sweep(members))
    driver::write_summary(directory, its_members);
}

/// --summary: of members that ran each in a start of its own. Throws UserError naming those that
/// are not finished.
void summarize(const CommandLine& line) {
  const std::vector<Member> members = members_of(line.request);
  std::string unfinished;
  for (const Member& member : members) {
    const std::string due = driver::what_is_due(member.composition);
    if (!due.empty()) unfinished += fmt::format("\n  {}: {}", member.directory.string(), due);
  }
  write_summaries(members);
  if (!unfinished.empty())
    throw UserError("members of the sweep are not finished; start it again without --summary:" +
                    unfinished);
}

/// The communicator with the deadline that this configuration asks for.
comm::Communicator world_of(const config::Composition& composition) {
  return comm::Communicator::world(
      composition.root().child("cluster").number("timeout_seconds", {.low = 0, .low_open = true}));
}

/// Members one after another, each checked before the first of them begins. One whose figures left
/// the finite range ends this start, and at the next it is passed over.
void run_sweep(const CommandLine& line, std::optional<comm::Communicator>& group) {
  const std::vector<Member> all = members_of(line.request);
  const std::vector<Member> members = wanted_of(all, line);
  for (const Member& member : members) {
    group = world_of(member.composition);
    if (line.plan)
      driver::plan(member.composition, *group);
    else
      driver::check(member.composition, *group);
  }
  if (line.plan) return;
  if (group->is_root())
    for (const auto& [directory, its_members] : by_sweep(all))
      driver::write_members(directory, its_members);
  std::map<std::filesystem::path, driver::SharedStages> shared;
  std::string diverged;
  for (const Member& member : members) {
    group = world_of(member.composition);
    const auto directory = sweep_directory(member.composition);
    driver::SharedStages& siblings = shared.try_emplace(directory, directory).first->second;
    try {
      driver::carry_out(member.composition, *group, &siblings);
    } catch (const driver::Diverged& failure) {
      diverged += fmt::format("\n  {}", failure.what());
    }
  }
  // One member alone leaves the summary to --summary: others are at work.
  if (line.member == 0 && group->is_root()) write_summaries(members);
  group->barrier();
  if (!diverged.empty())
    throw NumericalError("the sweep is done but for members that have no figures:" + diverged);
}

void run(const CommandLine& line, std::optional<comm::Communicator>& group) {
  if (line.multirun) return run_sweep(line, group);
  const config::Composition composition = config::compose(line.request);
  group = world_of(composition);
  if (line.plan)
    driver::plan(composition, *group);
  else
    driver::carry_out(composition, *group);
}

void print_facts(const inspect::Facts& facts, bool as_json) {
  constexpr auto kReplace = nlohmann::json::error_handler_t::replace;  // names need be no UTF-8
  fmt::print("{}", as_json ? facts.dump(2, ' ', false, kReplace) + "\n" : inspect::text_of(facts));
}

void print(const CommandLine& line) {
  switch (line.wish) {
    case CommandLine::Wish::help:
      fmt::print("{}\n{}", driver::usage(), config::describe_groups(line.request.directory));
      return;
    case CommandLine::Wish::version:
      fmt::print("espalier {}\n", ESPALIER_VERSION);
      return;
    case CommandLine::Wish::configuration:
      fmt::print("{}", config::compose(line.request).yaml(line.resolve));
      return;
    case CommandLine::Wish::defaults:
      fmt::print("{}", config::compose(line.request).defaults_list());
      return;
    case CommandLine::Wish::members:
      for (const Member& member : members_of(line.request))
        fmt::print("{}\n", member.directory.string());
      return;
    case CommandLine::Wish::summary:
      summarize(line);
      return;
    case CommandLine::Wish::decode:
      linalg::one_library_thread();
      compress::decode_residuals(line.decode.front(),
                                 {line.decode.begin() + 1, line.decode.end() - 1},
                                 line.decode.back());
      fmt::print("decoded into {}\n", line.decode.back());
      return;
    case CommandLine::Wish::inspect:
      return print_facts(inspect::inspect(line.inspect), line.as_json);
    case CommandLine::Wish::status:
      return print_facts(inspect::status(line.inspect), line.as_json);
    case CommandLine::Wish::run:
      return;
  }
}

int end(const std::optional<comm::Communicator>& group, const std::string& message, int code) {
  if (group) group->abort(message, code);
  std::fprintf(stderr, "espalier: %s\n", message.c_str());
  return code;
}

}  // namespace

int main(int count, char** arguments) {
  driver::install_signal_handlers();
  std::optional<comm::Communicator> group;
  try {
    const CommandLine line = driver::read_command_line(count, arguments);
    if (line.wish != CommandLine::Wish::run) {
      print(line);
      return 0;
    }
    // Before anything may fail: an error of one rank must end all of them with one message.
    group = comm::Communicator::world(600);
    run(line, group);
    return 0;
  } catch (const Error& error) {
    return end(group, error.what(), error.exit_code());
  } catch (const std::filesystem::filesystem_error& error) {
    return end(group, error.what(), kExitEnvironment);
  } catch (const std::bad_alloc&) {
    return end(group, "out of memory", kExitEnvironment);
  } catch (const std::exception& error) {
    return end(group, fmt::format("defect: {}", error.what()), kExitDefect);
  }
}
