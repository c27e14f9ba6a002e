#include "pipeline/driver/command_line.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <span>
#include <system_error>

#include "pipeline/errors.h"

namespace espalier::driver {
namespace {

namespace fs = std::filesystem;

/// configs/ of the source tree: found upwards from the executable, else where it was built from.
fs::path default_config_directory() {
  std::error_code error;
  fs::path folder = fs::read_symlink("/proc/self/exe", error).parent_path();
  for (int level = 0; level < 4 && !folder.empty(); ++level, folder = folder.parent_path())
    if (fs::is_regular_file(folder / "configs" / "default.yaml")) return folder / "configs";
  return fs::path(ESPALIER_SOURCE_DIR) / "configs";
}

/// K of --member, from 1.
size_t member_number(const std::string& text) {
  size_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number == 0)
    throw UserError(fmt::format("--member: \"{}\" is no number of a member, 1 or more", text));
  return number;
}

}  // namespace

std::string usage() {
  return R"(espalier: prunes a language model, retrains it inside its mask, stores what changed, exports it.

usage: espalier [flags] [overrides]
       mpirun -n RANKS espalier [flags] [overrides]
       espalier decode BASE RESIDUAL.h5... OUT  residuals on their base, as a dense checkpoint
       espalier inspect PATH [--json]           what a model, an artifact or a run holds
       espalier status RUN_DIR [--json]         how far a run or the members of a sweep are

flags
  --config-name NAME    the configuration (default: default)
  --config-dir DIR      where all configurations lie, instead of configs/ of the source tree
  -m, --multirun        a sweep: comma lists, range(), choice(), glob() in overrides
      --member K        of the sweep only member K, counted from 1; no summary is written
      --members         print the directories of the sweep's members, one a line
      --summary         write the sweep's summary from the results that are there
  --cfg job|all         print the composed configuration; --resolve replaces interpolations
  --info defaults       print the defaults list that was composed
  --plan                check everything as a run does, print what each stage will do, write nothing
  --help, --version

overrides
  key=value  +new=value  ++force=value  ~drop  group=choice
  What a key means and which values it takes: the comments in configs/default.yaml, configs/GROUP/base.yaml and
  configs/GROUP/CHOICE.yaml.

example
  espalier prune=sparsegpt prune.pattern=2:4 model.path=MODEL data.calibration=F.h5 data.train=T.h5 \
      evaluate.tasks.text.data=E.h5 compress.budget=0.05
)";
}

CommandLine read_command_line(int count, char** arguments) {
  CommandLine line;
  line.request.directory = default_config_directory();
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (std::ranges::any_of(words, [](auto& word) { return word == "--help" || word == "-h"; })) {
    line.wish = CommandLine::Wish::help;
    return line;
  }
  size_t i = 0;
  if (!words.empty() && words[0] == "decode") {
    line.wish = CommandLine::Wish::decode;
    line.decode.assign(words.begin() + 1, words.end());
    if (line.decode.size() < 3)
      throw UserError(fmt::format("decode takes BASE RESIDUAL.h5... OUT; {} words are given",
                                  line.decode.size()));
    return line;
  }
  if (!words.empty() && (words[0] == "inspect" || words[0] == "status")) {
    const std::string form =
        words[0] == "inspect" ? "inspect takes PATH [--json]" : "status takes RUN_DIR [--json]";
    line.wish = words[0] == "inspect" ? CommandLine::Wish::inspect : CommandLine::Wish::status;
    for (const std::string& word : std::span(words).subspan(1)) {
      if (word == "--json")
        line.as_json = true;
      else if (line.inspect.empty() && !word.starts_with("-"))
        line.inspect = word;
      else
        throw UserError(fmt::format("{}; {} is neither", form, word));
    }
    if (line.inspect.empty()) throw UserError(form);
    return line;
  }
  // "--flag value" and "--flag=value".
  const auto value = [&](const std::string& flag) {
    const std::string& word = words[i];
    if (word.starts_with(flag + "=")) return word.substr(flag.size() + 1);
    if (++i >= words.size()) throw UserError(flag + " needs a value; see --help");
    return words[i];
  };
  const auto is = [&](const std::string& flag) {
    return words[i] == flag || words[i].starts_with(flag + "=");
  };
  std::string of_sweep;  // a flag that is given and belongs to a sweep
  for (; i < words.size(); ++i) {
    const std::string& word = words[i];
    if (is("--config-name") || is("-cn")) {
      line.request.name = value(is("-cn") ? "-cn" : "--config-name");
    } else if (is("--config-dir") || is("-cd")) {
      line.request.directory = value(is("-cd") ? "-cd" : "--config-dir");
    } else if (word == "-m" || word == "--multirun") {
      line.multirun = true;
    } else if (word == "--members" || word == "--summary") {
      line.wish = word == "--members" ? CommandLine::Wish::members : CommandLine::Wish::summary;
      of_sweep = word;
    } else if (is("--member")) {
      line.member = member_number(value("--member"));
      of_sweep = "--member";
    } else if (is("--cfg") || is("-c")) {
      const std::string what = value(is("-c") ? "-c" : "--cfg");
      if (what != "job" && what != "all")
        throw UserError(fmt::format("--cfg: \"{}\" is none of job, all", what));
      line.wish = CommandLine::Wish::configuration;
    } else if (word == "--resolve") {
      line.resolve = true;
    } else if (is("--info") || is("-i")) {
      const std::string what = value(is("-i") ? "-i" : "--info");
      if (what != "defaults") throw UserError(fmt::format("--info: \"{}\" is not defaults", what));
      line.wish = CommandLine::Wish::defaults;
    } else if (word == "--version") {
      line.wish = CommandLine::Wish::version;
    } else if (word == "--plan") {
      line.plan = true;
    } else if (word.starts_with("-")) {
      throw UserError(fmt::format("{} is no flag of espalier; see espalier --help", word));
    } else if (word.find('=') == std::string::npos && !word.starts_with("~")) {
      throw UserError(
          fmt::format("{} is no override (key=value, ~key) and, as the first word, none of decode, "
                      "inspect, status",
                      word));
    } else {
      line.request.overrides.push_back(word);
    }
  }
  if (line.resolve && line.wish != CommandLine::Wish::configuration)
    throw UserError("--resolve belongs to --cfg job");
  if (!of_sweep.empty() && !line.multirun)
    throw UserError(of_sweep + " belongs to a sweep; give -m as well");
  return line;
}

}  // namespace espalier::driver
