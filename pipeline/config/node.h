#pragma once
/// The composed tree: OmegaConf's value kinds, each with the place it was written.
///
/// Trees own their children; a node stands in one tree only (copy() before grafting). Strings with
/// `${` are kept as written (Kind::interpolation) until a Resolver replaces them.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace espalier::config {

enum class Kind { null, missing, boolean, integer, real, text, interpolation, list, mapping };

/// Where a value was written: a file and a line, or an override of the command line (line 0).
struct Origin {
  std::shared_ptr<const std::string> place;
  int line = 0;
  /// "configs/llama.yaml:12", "command line: prune.sparsity=1.2", or "" when unknown.
  std::string describe() const;
};

/// A mapping's key. YAML keys may be numbers or booleans; 1 and "1" are two keys.
struct Key {
  std::string text;
  Kind kind = Kind::text;
  bool operator==(const Key& other) const { return kind == other.kind && text == other.text; }
};

class Node;
using NodePtr = std::shared_ptr<Node>;

class Node {
 public:
  Kind kind = Kind::null;
  bool boolean = false;
  int64_t integer = 0;
  double real = 0;
  std::string text;  ///< of text, interpolation; the name that is missing for `missing`
  std::vector<NodePtr> items;
  std::vector<std::pair<Key, NodePtr>> entries;
  Origin origin;

  bool is_container() const { return kind == Kind::list || kind == Kind::mapping; }
  /// The entry of a mapping, nullptr when absent (or when this is no mapping).
  NodePtr find(const Key& key) const;
  NodePtr find(const std::string& key) const { return find(Key{key}); }
  void set(const Key& key, NodePtr value);
  void erase(const Key& key);
};

NodePtr make_node(Kind kind, Origin origin = {});
NodePtr make_boolean(bool value);
NodePtr make_integer(int64_t value);
NodePtr make_real(double value);
/// A string becomes `missing` when it is "???", `interpolation` when it holds "${".
NodePtr make_text(const std::string& text);
/// A string as it stands, whatever it holds.
NodePtr make_plain_text(const std::string& text);
NodePtr copy(const Node& node);
/// Gives every node of the tree this origin.
void place_all(Node& node, const Origin& origin);

/// Python's equality: 1 == 1.0 == True, mappings without regard to order.
bool equal_values(const Node& a, const Node& b);

/// Python's str() of the value: what a string interpolation inserts ("True", "None", "[1, 'x']").
std::string python_text(const Node& node);
/// Python's repr() of a float: the shortest text that reads back, "1.0", "1e-05", "inf".
std::string python_float(double value);
/// A short text of the value for messages: 1.2, "abc", null, a list, a mapping.
std::string describe_value(const Node& node);
const char* kind_name(Kind kind);

}  // namespace espalier::config
