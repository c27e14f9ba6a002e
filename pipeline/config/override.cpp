#include "pipeline/config/override.h"

#include <algorithm>

#include "pipeline/config/nearest.h"
#include "pipeline/config/override_functions.h"
#include "pipeline/config/scalars.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

constexpr size_t kMaximumBytes = 64 << 10;
constexpr int kMaximumDepth = 64;

/// Reads the part after '='.
class ValueParser {
 public:
  ValueParser(const std::string& text, size_t at) : text_(text), at_(at) {}

  Value value() {
    skip_space();
    if (ended()) return text_value("");
    Value first = element();
    Value result = peek_separator() ? choices(std::move(first)) : std::move(first);
    if (!ended()) fail("unexpected \"" + rest() + "\"");
    return result;
  }

 private:
  struct Nested {
    explicit Nested(ValueParser& parser) : parser(parser) {
      if (++parser.depth_ > kMaximumDepth) parser.fail("nested deeper than 64 levels");
    }
    ~Nested() { --parser.depth_; }
    ValueParser& parser;
  };

  [[noreturn]] void fail(const std::string& message) const {
    throw UserError(message + "; quote a text that holds such signs: key='...'");
  }
  std::string rest() const { return text_.substr(at_, 30); }
  bool ended() const { return at_ >= text_.size(); }
  char peek(size_t ahead = 0) const {
    return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0';
  }
  void skip_space() {
    while (peek() == ' ' || peek() == '\t') ++at_;
  }
  void expect(char c) {
    skip_space();
    if (peek() != c) {
      fail(std::string("expected '") + c +
           (ended() ? "' at the end" : "' before \"" + rest() + "\""));
    }
    ++at_;
  }
  /// A comma after optional space; the space stays when there is none.
  bool peek_separator() {
    size_t before = at_;
    skip_space();
    if (peek() == ',') return true;
    at_ = before;
    return false;
  }

  static Value text_value(const std::string& text, char quote = '\0') {
    Value value{.kind = Value::Kind::text};
    value.text = text;
    value.quote = quote;
    return value;
  }

  Value choices(Value first) {
    auto sweep = std::make_shared<Sweep>();
    sweep->simple = true;
    sweep->values.push_back(std::move(first));
    while (peek_separator()) {
      ++at_;
      skip_space();
      sweep->values.push_back(element());
    }
    for (const auto& member : sweep->values) {
      if (member.holds_sweep()) fail("a sweep cannot stand in a sweep");
    }
    Value value{.kind = Value::Kind::sweep};
    value.sweep = sweep;
    return value;
  }

  Value element() {
    Nested nested(*this);
    char c = peek();
    if (c == '\'' || c == '"') return quoted();
    if (c == '[') return list();
    if (c == '{') return mapping();
    size_t name_end = at_;
    while (name_end < text_.size() && is_identifier(text_.substr(at_, name_end - at_ + 1)))
      ++name_end;
    size_t open = text_.find_first_not_of(" \t", name_end);
    if (name_end > at_ && open != std::string::npos && text_[open] == '(')
      return function(name_end, open);
    return primitive(true);
  }

  Value quoted() {
    char quote = text_[at_++];
    std::string content;
    while (!ended()) {
      size_t backslashes = 0;
      while (peek(backslashes) == '\\') ++backslashes;
      at_ += backslashes;
      // Backslashes count only before the quote: pairs are halved, an odd one escapes it.
      bool before_quote = peek() == quote;
      content.append(before_quote ? backslashes / 2 : backslashes, '\\');
      if (ended()) break;
      if (before_quote && backslashes % 2 == 0) {
        ++at_;
        return text_value(content, quote);
      }
      content += text_[at_++];
    }
    fail("the quote " + std::string(1, quote) + " is not closed");
  }

  Value list() {
    Value value{.kind = Value::Kind::list};
    expect('[');
    skip_space();
    while (peek() != ']' || !value.items.empty()) {
      value.items.push_back(element());
      if (!peek_separator()) break;
      ++at_;
      skip_space();
    }
    expect(']');
    return value;
  }

  Value mapping() {
    Value value{.kind = Value::Kind::mapping};
    expect('{');
    skip_space();
    while (peek() != '}' || !value.entries.empty()) {
      Value key = primitive(false);
      expect(':');
      skip_space();
      value.entries.emplace_back(std::move(key), element());
      if (!peek_separator()) break;
      ++at_;
      skip_space();
    }
    expect('}');
    return value;
  }

  Value function(size_t name_end, size_t open) {
    Call call;
    call.name = text_.substr(at_, name_end - at_);
    at_ = open + 1;
    skip_space();
    while (peek() != ')' || !(call.positional.empty() && call.named.empty())) {
      std::string name = argument_name();
      Value argument = element();
      if (name.empty()) {
        if (!call.named.empty()) fail("a positional argument after a named one");
        call.positional.push_back(std::move(argument));
      } else {
        call.named.emplace_back(name, std::move(argument));
      }
      if (!peek_separator()) break;
      ++at_;
      skip_space();
    }
    expect(')');
    return call_function(call);
  }

  /// "name=" before an argument, or "".
  std::string argument_name() {
    size_t end = at_;
    while (end < text_.size() && is_identifier(text_.substr(at_, end - at_ + 1))) ++end;
    size_t equal = text_.find_first_not_of(" \t", end);
    if (end == at_ || equal == std::string::npos || text_[equal] != '=') return "";
    std::string name = text_.substr(at_, end - at_);
    at_ = equal + 1;
    skip_space();
    return name;
  }

  /// An unquoted word (with inner spaces), or a mapping's key: no ':' and no interpolation.
  Value primitive(bool is_value) {
    static const std::string plain = "/-\\+.$%*@?|", escapable = "\\()[]{}:=, \t";
    std::string word, spaces;
    bool escaped = false;
    size_t start = at_;
    while (!ended()) {
      char c = peek();
      size_t close = std::string::npos;
      if (c == ' ' || c == '\t') {
        if (at_ > start) spaces += c;
        ++at_;
        continue;
      }
      if (is_value && c == '$' && peek(1) == '{') {
        close = text_.find_first_of("{}", at_ + 2);
        if (close == std::string::npos || text_[close] != '}' || close == at_ + 2) {
          fail("\"" + rest() +
               "\" is not a closed interpolation (one inside another must be quoted)");
        }
        word += spaces + text_.substr(at_, close - at_ + 1);
        at_ = close + 1;
      } else if (c == '\\' && peek(1) != '\0' && escapable.find(peek(1)) != std::string::npos) {
        word += spaces + peek(1);
        escaped = true;
        at_ += 2;
      } else if (is_identifier(std::string(1, c)) || (c >= '0' && c <= '9') ||
                 plain.find(c) != std::string::npos || (is_value && c == ':')) {
        word += spaces + c;
        ++at_;
      } else {
        break;
      }
      spaces.clear();
    }
    if (at_ == start)
      fail(ended() ? "a value is missing at the end" : "unexpected \"" + rest() + "\"");
    if (!escaped) {
      if (NodePtr typed = grammar_scalar(word)) return typed_value(*typed);
    }
    return text_value(word);
  }

  static Value typed_value(const Node& node) {
    Value value;
    if (node.kind == Kind::boolean) value.kind = Value::Kind::boolean;
    if (node.kind == Kind::integer) value.kind = Value::Kind::integer;
    if (node.kind == Kind::real) value.kind = Value::Kind::real;
    value.boolean = node.boolean;
    value.integer = node.integer;
    value.real = node.real;
    return value;
  }

  const std::string& text_;
  size_t at_;
  int depth_ = 0;
};

bool is_key_part(const std::string& part) {
  if (part.empty()) return false;
  bool digits = std::all_of(part.begin(), part.end(), [](char c) { return c >= '0' && c <= '9'; });
  if (digits) return part == "0" || part[0] != '0';
  std::string plain = part;
  std::replace(plain.begin(), plain.end(), '$', '_');
  return is_identifier(plain);
}

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

/// "", a name, or names and indices with dots; the first of a single name is no number.
bool is_package(const std::string& text) {
  if (text.empty()) return true;
  std::vector<std::string> parts = split(text, '.');
  if (parts.size() == 1 && parts[0][0] >= '0' && parts[0][0] <= '9') return false;
  return std::all_of(parts.begin(), parts.end(), is_key_part);
}

bool is_group(const std::string& text) {
  std::vector<std::string> parts = split(text, '/');
  return parts.size() > 1 && std::all_of(parts.begin(), parts.end(), is_identifier);
}

}  // namespace

Override parse_override(const std::string& input) {
  std::string shown = input.size() > 200 ? input.substr(0, 200) + "..." : input;
  std::string place = "command line: " + shown + ": ";
  if (input.size() > kMaximumBytes) throw UserError(place + "an override has at most 64 KiB");
  Override result;
  result.input = input;
  size_t start = 0;
  if (input.starts_with("~")) {
    result.action = Override::Action::remove;
    start = 1;
  } else if (input.starts_with("++")) {
    result.action = Override::Action::force_add;
    start = 2;
  } else if (input.starts_with("+")) {
    result.action = Override::Action::add;
    start = 1;
  }
  size_t equal = input.find('=', start);
  std::string name = input.substr(start, equal == std::string::npos ? equal : equal - start);
  size_t at = name.find('@');
  result.key = name.substr(0, at);
  if (at != std::string::npos) {
    result.has_package = true;
    result.package = name.substr(at + 1);
  }
  if (!(is_package(result.key) || is_group(result.key)) || !is_package(result.package)) {
    throw UserError(place + "\"" + name + "\" is not a key (a.b.0) or a group (a/b, a/b@package)");
  }
  if (equal == std::string::npos) {
    if (result.action != Override::Action::remove) {
      throw UserError(place +
                      "there is no '='; an override has the form key=value, or ~key to remove");
    }
    return result;
  }
  result.has_value = true;
  try {
    result.value = ValueParser(input, equal + 1).value();
  } catch (const UserError& error) {
    throw UserError(place + error.what());
  }
  return result;
}

std::string Override::prefixed_key() const {
  const char* prefix = action == Action::add         ? "+"
                       : action == Action::force_add ? "++"
                       : action == Action::remove    ? "~"
                                                     : "";
  return prefix + key + (has_package ? "@" + package : "");
}

Origin Override::origin() const {
  return {std::make_shared<const std::string>(
              "command line: " + (input.size() > 200 ? input.substr(0, 200) + "..." : input)),
          0};
}

bool Value::holds_sweep() const {
  return kind == Kind::sweep ||
         std::any_of(items.begin(), items.end(),
                     [](const Value& item) { return item.holds_sweep(); }) ||
         std::any_of(entries.begin(), entries.end(),
                     [](const auto& entry) { return entry.second.holds_sweep(); });
}

NodePtr Value::node() const {
  switch (kind) {
    case Kind::null:
      return make_node(espalier::config::Kind::null);
    case Kind::boolean:
      return make_boolean(boolean);
    case Kind::integer:
      return make_integer(integer);
    case Kind::real:
      return make_real(real);
    case Kind::text:
      return make_text(text);
    case Kind::list: {
      NodePtr list = make_node(espalier::config::Kind::list);
      for (const auto& item : items) list->items.push_back(item.node());
      return list;
    }
    case Kind::mapping: {
      NodePtr mapping = make_node(espalier::config::Kind::mapping);
      for (const auto& [name, value] : entries) {
        if (name.kind == Kind::null) throw UserError("null cannot be a key");
        NodePtr key = name.node();
        bool is_text = name.kind == Kind::text;
        mapping->set({is_text                      ? name.text
                      : name.kind == Kind::boolean ? (name.boolean ? "true" : "false")
                                                   : python_text(*key),
                      is_text ? espalier::config::Kind::text : key->kind},
                     value.node());
      }
      return mapping;
    }
    case Kind::sweep:
      break;
  }
  throw UserError("a sweep inside a value; sweeps stand alone, and need --multirun");
}

namespace {

std::string escaped(const std::string& text) {
  std::string result;
  for (char c : text) {
    if (std::string("\\()[]{}:=, \t").find(c) != std::string::npos) result += '\\';
    result += c;
  }
  return result;
}

std::string in_quotes(const std::string& text, char quote) {
  std::string result(1, quote);
  size_t backslashes = 0;
  for (char c : text) {
    if (c == quote) result.append(backslashes + 1, '\\');
    backslashes = c == '\\' ? backslashes + 1 : 0;
    result += c;
  }
  return result.append(backslashes, '\\') + quote;
}

}  // namespace

std::string Value::written() const {
  switch (kind) {
    case Kind::null:
      return "null";
    case Kind::boolean:
      return boolean ? "True" : "False";
    case Kind::integer:
      return std::to_string(integer);
    case Kind::real:
      return python_float(real);
    case Kind::text:
      return quote ? in_quotes(text, quote) : escaped(text);
    case Kind::list: {
      std::vector<std::string> parts;
      for (const auto& item : items) parts.push_back(item.written());
      return "[" + join(parts, ",") + "]";
    }
    case Kind::mapping: {
      std::vector<std::string> parts;
      for (const auto& [name, value] : entries)
        parts.push_back(name.written() + ":" + value.written());
      return "{" + join(parts, ",") + "}";
    }
    case Kind::sweep:
      break;
  }
  throw UserError("a sweep inside a sweep");
}

}  // namespace espalier::config
