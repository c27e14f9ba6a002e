#pragma once
/// Typed reading of a composed configuration: the schema of a node is the code that reads it.
///
/// A stage reads its keys once, before any work: each read states type and range and marks the key
/// as known; finish() then refuses what nobody read, naming the nearest known key, the file and the
/// line. Messages have the form `FILE:LINE: prune.sparsity: 1.2 is outside [0, 1)`; a value that
/// came from the command line is named `command line: prune.sparsity=1.2`.

#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace espalier::config {

class Node;  // the composed tree (node.h)

struct Range {
  double low = -std::numeric_limits<double>::infinity();
  double high = std::numeric_limits<double>::infinity();
  bool low_open = false, high_open = false;  ///< (low or [low, high) or high]
};

class Section {
 public:
  /// `path` is where the node stands ("prune", "" for the root).
  Section(std::shared_ptr<const Node> node, std::string path);

  const std::string& path() const;
  bool has(const std::string& key) const;      ///< present, null or not
  bool is_null(const std::string& key) const;  ///< absent or null

  // A missing key, a null, `???` or another type is an error that states what is expected.
  std::string text(const std::string& key) const;
  bool flag(const std::string& key) const;
  int64_t integer(const std::string& key, Range range = {}) const;
  double number(const std::string& key, Range range = {}) const;
  std::string choice(const std::string& key, const std::vector<std::string>& legal) const;
  std::vector<std::string> texts(const std::string& key) const;
  std::vector<double> numbers(const std::string& key, Range range = {}) const;
  // Null or absent is nullopt (or the default).
  std::optional<std::string> optional_text(const std::string& key) const;
  std::optional<int64_t> optional_integer(const std::string& key, Range range = {}) const;
  std::optional<double> optional_number(const std::string& key, Range range = {}) const;
  bool flag_or(const std::string& key, bool otherwise) const;
  int64_t integer_or(const std::string& key, int64_t otherwise, Range range = {}) const;
  double number_or(const std::string& key, double otherwise, Range range = {}) const;
  std::string text_or(const std::string& key, const std::string& otherwise) const;

  /// The mapping under `key`; finish() covers it too.
  Section child(const std::string& key) const;
  /// Every mapping under `key`, in the order of the file.
  std::vector<std::pair<std::string, Section>> children(const std::string& key) const;
  /// The mappings of the list under `key`.
  std::vector<Section> items(const std::string& key) const;

  /// Marks keys as known though this run does not read them (another method's, say).
  void allow(const std::vector<std::string>& keys) const;
  /// Throws UserError for the first key of this section (and its children) that nobody read.
  void finish() const;
  /// Throws UserError placed at `key`: "FILE:LINE: prune.pattern: <message>".
  [[noreturn]] void fail(const std::string& key, const std::string& message) const;

  /// The resolved values as canonical JSON (sorted keys): the text that stage keys hash.
  std::string canonical() const;

 private:
  struct State;
  std::shared_ptr<State> state_;
};

}  // namespace espalier::config
