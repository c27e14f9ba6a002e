#include "pipeline/config/yaml_file.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/mark.h>
#include <yaml-cpp/parser.h>

#include <fstream>
#include <map>
#include <sstream>

#include "pipeline/config/interpolation.h"
#include "pipeline/config/scalars.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

constexpr size_t kMaximumBytes = 4 << 20;
constexpr size_t kMaximumDepth = 64;
constexpr size_t kMaximumValues = 200000;

/// Builds the tree from the parser's events; aliases are copied, so a bomb meets kMaximumValues.
class Builder : public YAML::EventHandler {
 public:
  Builder(std::shared_ptr<const std::string> place, const std::string& text)
      : place_(std::move(place)), text_(text) {}

  NodePtr root;
  int documents = 0;

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (++documents > 1)
      fail(mark, "a second document starts here; a configuration is one document");
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    // The parser takes [,] for [null]; YAML does not.
    bool in_list = !open_.empty() && open_.back().node->kind == Kind::list;
    size_t at = static_cast<size_t>(mark.pos);
    if (in_list && mark.pos >= 0 && at < text_.size() && text_[at] == ',') {
      fail(mark, "not valid YAML: an element is missing before ','");
    }
    add(mark, anchor, make_node(Kind::null));
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    auto found = anchors_.find(anchor);
    if (found == anchors_.end()) fail(mark, "an alias refers to the value that contains it");
    count(*found->second, mark, open_.size());
    add(mark, 0, copy(*found->second));
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    NodePtr node;
    try {
      if (tag == "?") {
        node = yaml_scalar(value);
        merge_key_ = value == "<<";
      } else {
        node = tag == "!" ? make_text(value) : yaml_tagged_scalar(tag, value);
      }
      if (node->kind == Kind::interpolation) check_interpolation(value);
    } catch (const UserError& error) {
      fail(mark, error.what());
    }
    add(mark, anchor, node);
    merge_key_ = false;
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    start(mark, tag, anchor, Kind::list, "tag:yaml.org,2002:seq");
  }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    start(mark, tag, anchor, Kind::mapping, "tag:yaml.org,2002:map");
  }
  void OnSequenceEnd() override { end(); }
  void OnMapEnd() override { end(); }

  [[noreturn]] void fail(const YAML::Mark& mark, const std::string& message) const {
    throw UserError(Origin{place_, mark.line + 1}.describe() + ": " + message);
  }

 private:
  struct Open {
    NodePtr node;
    YAML::anchor_t anchor;
    YAML::Mark mark;
    bool has_key = false, is_merge = false;
    Key key = {};
    std::vector<NodePtr> merged = {};
  };

  void start(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, Kind kind,
             const char* own_tag) {
    if (tag != "?" && tag != "!" && tag != own_tag)
      fail(mark, "the tag " + tag + " is not supported");
    if (open_.size() >= kMaximumDepth) {
      fail(mark, "nested deeper than " + std::to_string(kMaximumDepth) + " levels");
    }
    if (!open_.empty() && open_.back().node->kind == Kind::mapping && !open_.back().has_key) {
      fail(mark, "a list or a mapping cannot be a key");
    }
    Open open{.node = make_node(kind, {place_, mark.line + 1}), .anchor = anchor, .mark = mark};
    open_.push_back(std::move(open));
  }

  void end() {
    Open open = std::move(open_.back());
    open_.pop_back();
    if (!open.merged.empty()) apply_merges(open);
    add(open.mark, open.anchor, open.node);
  }

  /// `<<`: the merged mappings come first, own keys override them.
  void apply_merges(Open& open) {
    NodePtr result = make_node(Kind::mapping, open.node->origin);
    for (const auto& source : open.merged) {
      count(*source, open.mark, open_.size());
      for (const auto& [key, value] : source->entries) result->set(key, copy(*value));
    }
    for (const auto& [key, value] : open.node->entries) result->set(key, value);
    open.node = result;
  }

  void add(const YAML::Mark& mark, YAML::anchor_t anchor, NodePtr node) {
    if (++values_ > kMaximumValues)
      fail(mark, "more than " + std::to_string(kMaximumValues) + " values");
    if (!node->origin.place) node->origin = {place_, mark.line + 1};
    if (anchor != 0) anchors_[anchor] = node;
    if (open_.empty()) {
      root = node;
    } else if (open_.back().node->kind == Kind::list) {
      open_.back().node->items.push_back(node);
    } else if (!open_.back().has_key) {
      take_key(mark, *node);
    } else {
      take_value(mark, node);
    }
  }

  void take_key(const YAML::Mark& mark, const Node& node) {
    Open& open = open_.back();
    open.has_key = true;
    open.is_merge = merge_key_;
    if (merge_key_) return;
    if (node.kind == Kind::null) fail(mark, "null cannot be a key; quote it: 'null'");
    if (node.is_container()) fail(mark, "a list or a mapping cannot be a key");
    open.key = {node.kind == Kind::boolean ? (node.boolean ? "true" : "false") : python_text(node),
                node.kind};
    if (node.kind == Kind::missing || node.kind == Kind::interpolation) open.key.kind = Kind::text;
    if (open.node->find(open.key)) fail(mark, "duplicate key " + open.key.text);
  }

  void take_value(const YAML::Mark& mark, const NodePtr& node) {
    Open& open = open_.back();
    open.has_key = false;
    if (!open.is_merge) {
      open.node->entries.emplace_back(open.key, node);
      return;
    }
    std::vector<NodePtr> sources = node->kind == Kind::list ? node->items : std::vector{node};
    for (const auto& source : sources) {
      if (source->kind != Kind::mapping) fail(mark, "<< takes a mapping or a list of mappings");
    }
    // The first of a list wins, so it is applied last.
    open.merged.insert(open.merged.end(), sources.rbegin(), sources.rend());
    open.is_merge = false;
  }

  /// Counts what an alias or a merge copies, and how deep it reaches, before the copy is made.
  void count(const Node& node, const YAML::Mark& mark, size_t depth) {
    if (++values_ > kMaximumValues) {
      fail(mark, "aliases expand to more than " + std::to_string(kMaximumValues) + " values");
    }
    if (depth > kMaximumDepth) {
      fail(mark, "nested deeper than " + std::to_string(kMaximumDepth) + " levels");
    }
    for (const auto& item : node.items) count(*item, mark, depth + 1);
    for (const auto& entry : node.entries) count(*entry.second, mark, depth + 1);
  }

  std::shared_ptr<const std::string> place_;
  const std::string& text_;
  std::map<YAML::anchor_t, NodePtr> anchors_;
  std::vector<Open> open_;
  size_t values_ = 0;
  bool merge_key_ = false;
};

std::string strip(const std::string& line) {
  size_t first = line.find_first_not_of(" \t\r");
  if (first == std::string::npos) return "";
  return line.substr(first, line.find_last_not_of(" \t\r") - first + 1);
}

/// Header lines `# @key value` before anything else; blank lines between them are skipped.
std::optional<std::string> header_package(const std::string& text, const std::string& name) {
  std::optional<std::string> package;
  std::istringstream lines(text);
  std::string line;
  for (int number = 1; std::getline(lines, line); ++number) {
    line = strip(line);
    if (line.empty()) continue;
    if (line[0] != '#') break;
    std::string body = strip(line.substr(line.find_first_not_of('#') == std::string::npos
                                             ? line.size()
                                             : line.find_first_not_of('#')));
    if (!body.starts_with("@")) break;
    std::istringstream words(body);
    std::string key, value, more;
    words >> key >> value >> more;
    if (value.empty() || !more.empty()) {
      throw UserError(name + ":" + std::to_string(number) +
                      ": a header has the form \"# @package NAME\", found \"" + line + "\"");
    }
    if (key == "@package") package = value;
  }
  return package;
}

}  // namespace

YamlFile read_yaml_text(const std::string& text, const std::string& name) {
  if (text.size() > kMaximumBytes) {
    throw UserError(name + ": " + std::to_string(text.size()) +
                    " bytes; a configuration file has at most " + std::to_string(kMaximumBytes));
  }
  auto place = std::make_shared<const std::string>(name);
  Builder builder(place, text);
  try {
    std::istringstream stream(text);
    YAML::Parser parser(stream);
    while (parser.HandleNextDocument(builder)) {
    }
  } catch (const YAML::Exception& error) {
    builder.fail(error.mark, "not valid YAML: " + error.msg);
  }
  YamlFile file{.root = builder.root, .package = header_package(text, name)};
  if (!file.root || file.root->kind == Kind::null) file.root = make_node(Kind::mapping, {place, 1});
  if (!file.root->is_container()) {
    throw UserError(name + ":1: a configuration is a mapping of keys, found " +
                    describe_value(*file.root));
  }
  return file;
}

YamlFile read_yaml_file(const std::filesystem::path& file) {
  std::error_code error;
  uintmax_t bytes = std::filesystem::file_size(file, error);
  if (error) throw UserError(file.string() + ": cannot be read: " + error.message());
  if (bytes > kMaximumBytes) {
    throw UserError(file.string() + ": " + std::to_string(bytes) +
                    " bytes; a configuration file has at most " + std::to_string(kMaximumBytes));
  }
  std::ifstream stream(file, std::ios::binary);
  std::string text((std::istreambuf_iterator<char>(stream)), std::istreambuf_iterator<char>());
  if (!stream) throw UserError(file.string() + ": cannot be read");
  return read_yaml_text(text, file.string());
}

}  // namespace espalier::config
