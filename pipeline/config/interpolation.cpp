#include "pipeline/config/interpolation.h"

#include <algorithm>

#include "pipeline/config/scalars.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

constexpr int kMaximumDepth = 64;

/// Parts of a string: literal text and values of interpolations.
struct Pieces {
  std::string text;
  NodePtr only;  ///< the value, while the string is one interpolation and nothing else
  bool literal = false, mixed = false;

  void add(char c) {
    demote();
    text += c;
    literal = true;
  }
  void add(const NodePtr& node) {
    if (!literal && !only && !mixed) {
      only = node;
      return;
    }
    demote();
    mixed = true;
    text += python_text(*node);
  }
  void demote() {
    if (!only) return;
    text += python_text(*only);
    only = nullptr;
    mixed = true;
  }
};

class Parser {
 public:
  Parser(const std::string& text, Lookup& lookup) : text_(text), lookup_(lookup) {}

  NodePtr whole_text() {
    Pieces pieces = string_until('\0');
    return pieces.only ? pieces.only : make_plain_text(pieces.text);
  }

  NodePtr whole_element() {
    skip_space();
    NodePtr node = element();
    skip_space();
    if (at_ < text_.size()) fail("unexpected \"" + text_.substr(at_) + "\"");
    return node;
  }

 private:
  struct Nested {
    explicit Nested(Parser& parser) : parser(parser) {
      if (++parser.depth_ > kMaximumDepth) parser.fail("nested deeper than 64 levels");
    }
    ~Nested() { --parser.depth_; }
    Parser& parser;
  };

  [[noreturn]] void fail(const std::string& message) const {
    throw UserError("\"" + text_.substr(0, 200) + "\" is not a valid interpolation: " + message);
  }

  char peek(size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
  }
  bool ended() const { return at_ >= text_.size(); }
  bool starts(const char* token) const {
    return text_.compare(at_, std::char_traits<char>::length(token), token) == 0;
  }
  void skip_space() {
    while (!ended() && (peek() == ' ' || peek() == '\t' || peek() == '\n' || peek() == '\r')) ++at_;
  }
  void expect(char c) {
    if (peek() != c) {
      fail(std::string("expected '") + c + "' " +
           (ended() ? "at the end" : "before \"" + text_.substr(at_, 20) + "\""));
    }
    ++at_;
  }

  /// Text with interpolations up to `quote` (or the end): backslashes count only before a quote or
  /// `${`.
  Pieces string_until(char quote) {
    Pieces pieces;
    while (!ended()) {
      size_t backslashes = 0;
      while (peek(backslashes) == '\\') ++backslashes;
      at_ += backslashes;
      bool quote_next = quote != '\0' && peek() == quote;
      bool special = quote_next || starts("${");
      for (size_t i = 0; i < (special ? backslashes / 2 : backslashes); ++i) pieces.add('\\');
      if (ended()) break;
      if (special && backslashes % 2 == 1) {
        pieces.add(peek());
        ++at_;
        if (!quote_next) {
          pieces.add(peek());
          ++at_;
        }
      } else if (quote_next) {
        return pieces;
      } else if (starts("${")) {
        pieces.add(interpolation());
      } else {
        pieces.add(peek());
        ++at_;
      }
    }
    if (quote != '\0') fail("the quote " + std::string(1, quote) + " is not closed");
    return pieces;
  }

  NodePtr interpolation() {
    Nested nested(*this);
    at_ += 2;
    skip_space();
    int dots = 0;
    while (peek() == '.') {
      ++dots;
      ++at_;
    }
    std::vector<std::string> path;
    bool can_name_resolver = dots == 0;
    for (bool first = true;; first = false) {
      if (peek() == '[') {
        ++at_;
        path.push_back(path_component(can_name_resolver));
        expect(']');
        can_name_resolver = false;
      } else if (first || peek() == '.') {
        if (!first) ++at_;
        path.push_back(path_component(can_name_resolver));
      } else {
        break;
      }
    }
    if (can_name_resolver && peek() == ':') return resolver(path);
    skip_space();
    expect('}');
    return lookup_.key(dots, path);
  }

  std::string path_component(bool& can_name_resolver) {
    if (starts("${")) return python_text(*interpolation());
    static const std::string stops = "\\{}()[]:. \t\n\r'\"";
    std::string name;
    while (!ended() && stops.find(peek()) == std::string::npos && !starts("${"))
      name += text_[at_++];
    if (name.empty())
      fail(ended() ? "it is not closed"
                   : "a key is missing before \"" + text_.substr(at_, 20) + "\"");
    if (!is_identifier(name)) can_name_resolver = false;
    return name;
  }

  NodePtr resolver(const std::vector<std::string>& path) {
    std::string name;
    for (const auto& part : path) name += (name.empty() ? "" : ".") + part;
    expect(':');
    skip_space();
    std::vector<std::string> texts;
    std::vector<NodePtr> arguments;
    if (peek() != '}') arguments = sequence('}', texts);
    expect('}');
    return lookup_.resolver(name, arguments, texts);
  }

  /// Elements separated by commas; an empty one between commas is the empty string.
  std::vector<NodePtr> sequence(char closing, std::vector<std::string>& texts) {
    std::vector<NodePtr> values;
    for (;;) {
      skip_space();
      size_t start = at_;
      bool empty = peek() == ',' || peek() == closing;
      values.push_back(empty ? make_plain_text("") : element());
      texts.push_back(text_.substr(start, at_ - start));
      skip_space();
      if (peek() != ',') return values;
      ++at_;
    }
  }

  NodePtr element() {
    Nested nested(*this);
    if (peek() == '\'' || peek() == '"') return quoted();
    if (peek() == '[') {
      ++at_;
      NodePtr list = make_node(Kind::list);
      std::vector<std::string> texts;
      skip_space();
      if (peek() != ']') {
        for (const auto& item : sequence(']', texts)) list->items.push_back(copy(*item));
      }
      expect(']');
      return list;
    }
    if (peek() == '{') return dictionary();
    return primitive(true);
  }

  NodePtr quoted() {
    char quote = text_[at_++];
    Pieces pieces = string_until(quote);
    expect(quote);
    // A quoted value is a string even when it is one interpolation.
    return make_plain_text(pieces.only ? python_text(*pieces.only) : pieces.text);
  }

  NodePtr dictionary() {
    expect('{');
    NodePtr mapping = make_node(Kind::mapping);
    skip_space();
    while (peek() != '}') {
      NodePtr name = primitive(false);
      Key key{name->kind == Kind::boolean ? (name->boolean ? "true" : "false") : python_text(*name),
              name->kind};
      expect(':');
      skip_space();
      mapping->set(key, copy(*element()));
      skip_space();
      if (peek() != ',') break;
      ++at_;
      skip_space();
      if (peek() == '}') fail("a key is missing after the last comma");
    }
    expect('}');
    return mapping;
  }

  /// An unquoted value or (without ':' and interpolations) a dictionary's key.
  NodePtr primitive(bool is_value) {
    static const std::string plain = "/-\\+.$%*@?|";
    Pieces pieces;
    std::string spaces;  // inner ones are kept, outer ones dropped
    bool escaped = false;
    auto flush = [&] {
      for (char space : spaces) pieces.add(space);
      spaces.clear();
    };
    size_t start = at_;
    while (!ended()) {
      char c = peek();
      if (c == ' ' || c == '\t' || c == '\n' || c == '\r') {
        if (at_ > start) spaces += c;
      } else if (is_value && starts("${")) {
        flush();
        pieces.add(interpolation());
        continue;
      } else if (c == '\\' && peek(1) != '\0' &&
                 std::string("\\()[]{}:=, \t").find(peek(1)) != std::string::npos) {
        flush();
        pieces.add(peek(1));
        escaped = true;
        ++at_;
      } else if (is_identifier(std::string(1, c)) || (c >= '0' && c <= '9') ||
                 plain.find(c) != std::string::npos || (is_value && c == ':')) {
        flush();
        pieces.add(c);
      } else {
        break;
      }
      ++at_;
    }
    if (at_ == start) {
      fail(ended() ? "it is not closed"
                   : "unexpected \"" + text_.substr(at_, 20) + "\"; quote the value");
    }
    if (pieces.only) return pieces.only;
    if (!pieces.mixed && !escaped) {
      if (NodePtr typed = grammar_scalar(pieces.text)) return typed;
    }
    return make_plain_text(pieces.text);
  }

  const std::string& text_;
  Lookup& lookup_;
  size_t at_ = 0;
  int depth_ = 0;
};

struct NoLookup : Lookup {
  NodePtr key(int, const std::vector<std::string>&) override { return make_plain_text("x"); }
  NodePtr resolver(const std::string&, const std::vector<NodePtr>&,
                   const std::vector<std::string>&) override {
    return make_plain_text("x");
  }
};

}  // namespace

NodePtr evaluate_text(const std::string& text, Lookup& lookup) {
  return Parser(text, lookup).whole_text();
}

NodePtr evaluate_element(const std::string& text, Lookup& lookup) {
  return Parser(text, lookup).whole_element();
}

void check_interpolation(const std::string& text) {
  NoLookup nothing;
  evaluate_text(text, nothing);
}

}  // namespace espalier::config
