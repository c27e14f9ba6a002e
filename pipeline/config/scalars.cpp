#include "pipeline/config/scalars.h"

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cstdlib>
#include <limits>

#include "pipeline/errors.h"

namespace espalier::config {
namespace {

/// Matches a regular expression by hand: std::regex recurses once a character, which a long hostile
/// scalar turns into a stack overflow.
struct Matcher {
  std::string_view text;
  size_t at = 0;

  bool done() const { return at == text.size(); }
  char peek() const { return at < text.size() ? text[at] : '\0'; }
  bool take(char c) {
    if (done() || text[at] != c) return false;
    ++at;
    return true;
  }
  bool take_any(std::string_view set) {
    if (done() || set.find(text[at]) == std::string_view::npos) return false;
    ++at;
    return true;
  }
  size_t take_all(std::string_view set) {
    size_t start = at;
    while (take_any(set)) {
    }
    return at - start;
  }
  void sign() { take_any("+-"); }
};

constexpr std::string_view kDigits = "0123456789";
constexpr std::string_view kDigitsBar = "0123456789_";

bool one_of(const std::string& text, std::initializer_list<const char*> words) {
  return std::any_of(words.begin(), words.end(), [&](const char* word) { return text == word; });
}

/// (:[0-5]?[0-9])+
bool base60_tail(Matcher& m) {
  int count = 0;
  while (m.take(':')) {
    size_t start = m.at;
    if (m.take_all(kDigits) == 0) return false;
    size_t length = m.at - start;
    if (length > 2 || (length == 2 && m.text[start] > '5')) return false;
    ++count;
  }
  return count > 0;
}

bool is_yaml_integer(const std::string& text) {
  Matcher m{text};
  m.sign();
  Matcher start = m;
  if (m.take('0')) {
    Matcher prefix = m;
    if (m.take('b') && m.take_all("01_") > 0 && m.done()) return true;
    m = prefix;
    if (m.take('x') && m.take_all("0123456789abcdefABCDEF_") > 0 && m.done()) return true;
    m = prefix;
    m.take_all("01234567_");
    return m.done();
  }
  m = start;
  if (!m.take_any("123456789")) return false;
  m.take_all(kDigitsBar);
  return m.done() || (base60_tail(m) && m.done());
}

bool exponent(Matcher& m, bool sign_required) {
  if (!m.take_any("eE")) return false;
  if (!m.take_any("+-") && sign_required) return false;
  return m.take_all(kDigits) > 0;
}

/// The digits before the point: [0-9][0-9_]*; `strict` is [0-9]+(_[0-9]+)*.
bool leading_digits(Matcher& m, bool& strict) {
  size_t start = m.at;
  if (!m.take_any(kDigits)) return false;
  m.take_all(kDigitsBar);
  std::string_view part = m.text.substr(start, m.at - start);
  strict = part.back() != '_' && part.find("__") == std::string_view::npos;
  return true;
}

bool is_yaml_float(const std::string& text) {
  if (one_of(text, {".nan", ".NaN", ".NAN"})) return true;
  Matcher m{text};
  if (m.peek() == '.') {  // no sign in this form
    Matcher fraction = m;
    fraction.take('.');
    if (fraction.take_any(kDigits)) {
      fraction.take_all(kDigitsBar);
      return fraction.done() || (exponent(fraction, true) && fraction.done());
    }
  }
  m.sign();
  if (m.peek() == '.') return one_of(text.substr(m.at), {".inf", ".Inf", ".INF"});
  bool strict = false;
  if (!leading_digits(m, strict)) return false;
  if (m.peek() == ':') {
    if (!base60_tail(m) || !m.take('.')) return false;
    m.take_all(kDigitsBar);
    return m.done();
  }
  if (m.take('.')) {
    m.take_all(kDigitsBar);
    return m.done() || (exponent(m, !strict) && m.done());
  }
  return strict && exponent(m, false) && m.done();
}

std::string without_bars(std::string text) {
  std::erase(text, '_');
  return text;
}

[[noreturn]] void beyond_64_bits(const std::string& text) {
  throw UserError("the integer " + text + " does not fit 64 bits; quote it if it is a text");
}

int64_t decimal(const std::string& digits, int base, bool negative, const std::string& whole) {
  if (digits.empty()) throw UserError("\"" + whole + "\" has no digits; quote it if it is a text");
  uint64_t value = 0;
  auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value, base);
  if (end != digits.data() + digits.size() && error == std::errc{}) {
    throw UserError("\"" + whole + "\" is not an integer");
  }
  uint64_t limit = static_cast<uint64_t>(std::numeric_limits<int64_t>::max()) + (negative ? 1 : 0);
  if (error != std::errc{} || value > limit) beyond_64_bits(whole);
  return negative ? static_cast<int64_t>(~value + 1) : static_cast<int64_t>(value);
}

int64_t yaml_integer(const std::string& whole) {
  std::string text = without_bars(whole);
  bool negative = !text.empty() && text[0] == '-';
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.erase(0, 1);
  if (text == "0") return 0;
  if (text.starts_with("0b")) return decimal(text.substr(2), 2, negative, whole);
  if (text.starts_with("0x")) return decimal(text.substr(2), 16, negative, whole);
  if (text.starts_with("0")) return decimal(text, 8, negative, whole);
  if (text.find(':') == std::string::npos) return decimal(text, 10, negative, whole);
  int64_t value = 0;
  for (size_t at = 0; at <= text.size();) {
    size_t end = std::min(text.find(':', at), text.size());
    int64_t digit = decimal(text.substr(at, end - at), 10, false, whole);
    if (__builtin_mul_overflow(value, 60, &value) || __builtin_add_overflow(value, digit, &value)) {
      beyond_64_bits(whole);
    }
    at = end + 1;
  }
  return negative ? -value : value;
}

double yaml_float(const std::string& whole) {
  std::string text = without_bars(whole);
  std::transform(text.begin(), text.end(), text.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  double sign = !text.empty() && text[0] == '-' ? -1.0 : 1.0;
  if (!text.empty() && (text[0] == '-' || text[0] == '+')) text.erase(0, 1);
  if (text == ".inf") return sign * std::numeric_limits<double>::infinity();
  if (text == ".nan") return std::numeric_limits<double>::quiet_NaN();
  double value = 0;
  for (size_t at = 0; at <= text.size();) {
    size_t end = std::min(text.find(':', at), text.size());
    std::optional<double> part = parse_double(text.substr(at, end - at));
    if (!part) throw UserError("\"" + whole + "\" is not a number");
    value = value * 60 + *part;
    at = end + 1;
  }
  return sign * value;
}

NodePtr yaml_boolean(const std::string& text) {
  if (one_of(text, {"yes", "Yes", "YES", "true", "True", "TRUE", "on", "On", "ON"})) {
    return make_boolean(true);
  }
  if (one_of(text, {"no", "No", "NO", "false", "False", "FALSE", "off", "Off", "OFF"})) {
    return make_boolean(false);
  }
  return nullptr;
}

}  // namespace

std::optional<double> parse_double(std::string text) {
  size_t first = text.find_first_not_of(" \t\n\r");
  if (first == std::string::npos) return std::nullopt;
  text = text.substr(first, text.find_last_not_of(" \t\n\r") - first + 1);
  std::string lower = text;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  double sign = 1;
  if (lower[0] == '+' || lower[0] == '-') {
    sign = lower[0] == '-' ? -1 : 1;
    lower.erase(0, 1);
  }
  if (lower == "inf" || lower == "infinity") return sign * std::numeric_limits<double>::infinity();
  if (lower == "nan") return std::numeric_limits<double>::quiet_NaN();
  if (lower.empty() || (!std::isdigit(static_cast<unsigned char>(lower[0])) && lower[0] != '.')) {
    return std::nullopt;
  }
  double value = 0;
  auto [end, error] = std::from_chars(lower.data(), lower.data() + lower.size(), value);
  if (end != lower.data() + lower.size() || error == std::errc::invalid_argument)
    return std::nullopt;
  if (error == std::errc::result_out_of_range) value = std::strtod(lower.c_str(), nullptr);
  return sign * value;
}

NodePtr yaml_scalar(const std::string& text) {
  if (text.empty() || one_of(text, {"~", "null", "Null", "NULL"})) return make_node(Kind::null);
  if (NodePtr node = yaml_boolean(text)) return node;
  if (text == "=") throw UserError("a bare = has no value in YAML 1.1; quote it: \"=\"");
  if (is_yaml_integer(text)) return make_integer(yaml_integer(text));
  if (is_yaml_float(text)) return make_real(yaml_float(text));
  return make_text(text);
}

NodePtr yaml_tagged_scalar(const std::string& tag, const std::string& text) {
  constexpr std::string_view prefix = "tag:yaml.org,2002:";
  std::string name = tag.starts_with(prefix) ? tag.substr(prefix.size()) : "";
  if (name == "str") return make_text(text);
  if (name == "null") return make_node(Kind::null);
  if (name == "int") return make_integer(yaml_integer(text));
  if (name == "float") return make_real(yaml_float(text));
  if (name == "bool") {
    std::string lower = text;
    std::transform(lower.begin(), lower.end(), lower.begin(),
                   [](unsigned char c) { return std::tolower(c); });
    if (NodePtr node = yaml_boolean(lower)) return node;
    throw UserError("\"" + text + "\" is not a boolean");
  }
  throw UserError("the tag " + tag + " is not supported; legal: !!str !!int !!float !!bool !!null");
}

NodePtr grammar_scalar(const std::string& text) {
  if (text.empty()) return nullptr;
  std::string lower = text;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  if (lower == "null") return make_node(Kind::null);
  if (lower == "true" || lower == "false") return make_boolean(lower == "true");

  // INT: 0 | [1-9](_?[0-9])*; digits after a point or in an exponent may start with 0.
  auto digits = [](Matcher& m) {
    if (!m.take_any(kDigits)) return false;
    for (;;) {
      Matcher next = m;
      next.take('_');
      if (!next.take_any(kDigits)) return true;
      m = next;
    }
  };
  auto integer = [&](Matcher& m) { return m.peek() == '0' ? m.take('0') : digits(m); };
  Matcher m{lower};
  m.sign();
  std::string_view rest = m.text.substr(m.at);
  if (rest == "inf" || rest == "nan") return make_real(*parse_double(lower));
  bool has_integer = integer(m);
  if (has_integer && m.done()) {
    std::string plain = without_bars(lower);
    bool negative = plain[0] == '-';
    if (plain[0] == '-' || plain[0] == '+') plain.erase(0, 1);
    return make_integer(decimal(plain, 10, negative, text));
  }
  bool has_fraction = false;
  if (m.take('.')) has_fraction = digits(m);
  if (!has_integer && !has_fraction) return nullptr;
  if (!m.done()) {
    if (!m.take('e')) return nullptr;
    m.sign();
    if (!digits(m) || !m.done()) return nullptr;
  }
  std::optional<double> value = parse_double(without_bars(lower));
  return value ? make_real(*value) : nullptr;
}

bool is_identifier(std::string_view text) {
  auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; };
  if (text.empty() || !letter(text[0])) return false;
  return std::all_of(text.begin(), text.end(),
                     [&](char c) { return letter(c) || (c >= '0' && c <= '9') || c == '-'; });
}

}  // namespace espalier::config
