#pragma once
/// One override of the command line in Hydra's grammar: key=value, +key=value, ++key=value,
/// ~key[=value], group[@package]=choice, with quoted strings, lists, mappings, casts and sweeps.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/config/node.h"

namespace espalier::config {

struct Value;

/// choice(...), a,b,c, range(...), glob(...) or interval(...).
struct Sweep {
  enum class Kind { choice, range, glob, interval };
  Kind kind = Kind::choice;
  bool simple = false;                        ///< a,b,c without choice()
  std::vector<Value> values;                  ///< the choices; of a range: start, stop, step
  std::vector<std::string> include, exclude;  ///< of glob
};

struct Value {
  enum class Kind { null, boolean, integer, real, text, list, mapping, sweep };
  Kind kind = Kind::null;
  bool boolean = false;
  int64_t integer = 0;
  double real = 0;
  std::string text = {};
  char quote = '\0';  ///< of a quoted text
  std::vector<Value> items = {};
  std::vector<std::pair<Value, Value>> entries = {};
  std::shared_ptr<Sweep> sweep = {};

  NodePtr node() const;
  /// The value as an override writes it: what a sweep's member says.
  std::string written() const;
  bool holds_sweep() const;
};

struct Override {
  enum class Action { change, add, force_add, remove };
  Action action = Action::change;
  std::string input;
  std::string key;      ///< or group; without @package
  std::string package;  ///< after @
  bool has_package = false;
  bool has_value = false;
  Value value;

  /// "+db@x": the key with its prefix, what a sweep's member starts with.
  std::string prefixed_key() const;
  Origin origin() const;
};

/// Bounded: 64 levels, 64 KiB. Throws UserError naming the override and what is wrong with it.
Override parse_override(const std::string& input);

}  // namespace espalier::config
