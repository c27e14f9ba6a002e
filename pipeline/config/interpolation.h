#pragma once
/// The grammar of `${...}` in strings (OmegaConf 2.3): keys, relative keys, resolvers with their
/// arguments, quoting and escapes. Evaluation happens while parsing, through a Lookup.

#include <string>
#include <vector>

#include "pipeline/config/node.h"

namespace espalier::config {

/// What an interpolation's names stand for.
class Lookup {
 public:
  virtual ~Lookup() = default;
  /// `${a.b}` is {"a", "b"} with 0 dots; `${..b}` is {"b"} with 2.
  virtual NodePtr key(int dots, const std::vector<std::string>& path) = 0;
  /// `${oc.env:NAME,default}`; `texts` are the arguments as written.
  virtual NodePtr resolver(const std::string& name, const std::vector<NodePtr>& arguments,
                           const std::vector<std::string>& texts) = 0;
};

/// The value of a string with interpolations: the node itself when the whole string is one
/// `${...}`, otherwise the string with each one replaced by its value's text.
/// Throws UserError when the grammar is violated.
NodePtr evaluate_text(const std::string& text, Lookup& lookup);
/// The value of one element ("[1, {a: b}]"): what oc.decode reads.
NodePtr evaluate_element(const std::string& text, Lookup& lookup);
/// Throws UserError when the text's interpolations do not parse; looks nothing up.
void check_interpolation(const std::string& text);

}  // namespace espalier::config
