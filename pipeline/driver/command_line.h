#pragma once
/// The command line: Hydra's flags, and overrides in its grammar.

#include <cstddef>
#include <filesystem>
#include <string>
#include <vector>

#include "pipeline/config/compose.h"

namespace espalier::driver {

struct CommandLine {
  enum class Wish {
    run,
    help,
    configuration,
    defaults,
    version,
    decode,
    inspect,
    status,
    members,
    summary
  };
  Wish wish = Wish::run;
  bool multirun = false, resolve = false;
  bool plan = false;  ///< tell what the run would do instead of doing it
  size_t member = 0;  ///< of the sweep, the only one to carry out, from 1; 0: all
  config::Request request;
  std::vector<std::string> decode;  ///< BASE RESIDUAL... OUT
  std::string inspect;              ///< PATH, of status too
  bool as_json = false;
};

/// Throws UserError that states the usage for what it does not know.
CommandLine read_command_line(int count, char** arguments);

/// The text of --help before the groups.
std::string usage();

}  // namespace espalier::driver
