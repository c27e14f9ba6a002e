#include "pipeline/config/override_functions.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "pipeline/config/nearest.h"
#include "pipeline/config/scalars.h"
#include "pipeline/errors.h"

namespace espalier::config {
namespace {

using VK = Value::Kind;
constexpr size_t kMaximumRange = 10000;

const std::vector<std::string> kFunctions = {"bool",  "choice",  "float", "glob", "int", "interval",
                                             "range", "shuffle", "sort",  "str",  "tag"};

Value make_value(VK kind) {
  Value value;
  value.kind = kind;
  return value;
}

Value real_value(double real) {
  Value value = make_value(VK::real);
  value.real = real;
  return value;
}

Value integer_value(int64_t integer) {
  Value value = make_value(VK::integer);
  value.integer = integer;
  return value;
}

Value sweep_value(Sweep::Kind kind, std::vector<Value> values, bool simple) {
  Value value = make_value(VK::sweep);
  value.sweep = std::make_shared<Sweep>();
  value.sweep->kind = kind;
  value.sweep->simple = simple;
  value.sweep->values = std::move(values);
  return value;
}

bool is_number(const Value& value) { return value.kind == VK::integer || value.kind == VK::real; }
double number(const Value& value) {
  return value.kind == VK::integer ? static_cast<double>(value.integer) : value.real;
}

[[noreturn]] void cannot_cast(const Value& value, const std::string& type) {
  throw UserError((value.kind == VK::sweep  ? "a sweep"
                   : value.kind == VK::text ? "\"" + value.text + "\""
                                            : value.written()) +
                  " cannot be cast to " + type);
}

Value to_integer(const Value& value) {
  if (value.kind == VK::integer) return value;
  if (value.kind == VK::boolean) return integer_value(value.boolean ? 1 : 0);
  if (value.kind == VK::real && std::abs(value.real) < 9.2e18)
    return integer_value(static_cast<int64_t>(value.real));
  if (value.kind == VK::text) {
    size_t first = value.text.find_first_not_of(" \t");
    if (first != std::string::npos) {
      std::string text = value.text.substr(first, value.text.find_last_not_of(" \t") - first + 1);
      size_t digits = text.find_first_not_of("0", text[0] == '-' || text[0] == '+' ? 1 : 0);
      bool zeros = digits != 0 && digits != std::string::npos && text[digits - 1] == '0';
      if (zeros) text = (text[0] == '-' ? "-" : "") + text.substr(digits);
      NodePtr node = grammar_scalar(text);
      if (node && node->kind == Kind::integer) return integer_value(node->integer);
      if (digits == std::string::npos) return integer_value(0);
    }
  }
  cannot_cast(value, "int");
}

Value to_real(const Value& value) {
  if (is_number(value)) return real_value(number(value));
  if (value.kind == VK::boolean) return real_value(value.boolean ? 1 : 0);
  if (value.kind == VK::text) {
    std::string plain = value.text;
    std::erase(plain, '_');
    if (std::optional<double> real = parse_double(plain)) return real_value(*real);
  }
  cannot_cast(value, "float");
}

Value to_text(const Value& value) {
  Value result = make_value(VK::text);
  if (value.kind == VK::null) cannot_cast(value, "str");
  result.text = value.kind == VK::text      ? value.text
                : value.kind == VK::boolean ? (value.boolean ? "true" : "false")
                                            : value.written();
  return result;
}

Value to_boolean(const Value& value) {
  Value result = make_value(VK::boolean);
  std::string lower = value.text;
  std::transform(lower.begin(), lower.end(), lower.begin(),
                 [](unsigned char c) { return std::tolower(c); });
  if (value.kind == VK::boolean) {
    result.boolean = value.boolean;
  } else if (is_number(value)) {
    result.boolean = number(value) != 0;
  } else if (value.kind == VK::text && (lower == "true" || lower == "false")) {
    result.boolean = lower == "true";
  } else if (value.kind != VK::null) {
    cannot_cast(value, "bool");
  }
  return result;
}

/// Casts a scalar, the members of a list, the values of a mapping, the choices of a sweep.
Value cast(const Value& value, const std::string& type,
           const std::function<Value(const Value&)>& scalar) {
  Value result = value;
  if (value.kind == VK::sweep) {
    bool is_range = value.sweep->kind == Sweep::Kind::range;
    if (value.sweep->kind == Sweep::Kind::glob || (is_range && type != "int" && type != "float")) {
      throw UserError("this sweep cannot be cast to " + type);
    }
    result.sweep = std::make_shared<Sweep>(*value.sweep);
    for (auto& member : result.sweep->values) member = cast(member, type, scalar);
    return result;
  }
  if (value.kind != VK::list && value.kind != VK::mapping) return scalar(value);
  for (auto& item : result.items) item = cast(item, type, scalar);
  for (auto& entry : result.entries) entry.second = cast(entry.second, type, scalar);
  return result;
}

void refuse_named(const Call& call, const std::vector<std::string>& legal) {
  for (const auto& [name, value] : call.named) {
    if (std::find(legal.begin(), legal.end(), name) == legal.end()) {
      throw UserError(call.name + "() has no argument " + name + suggestion(name, legal));
    }
  }
}

/// Positional and named arguments in the order of `names`; absent ones are nullptr.
std::vector<const Value*> bind(const Call& call, const std::vector<std::string>& names) {
  refuse_named(call, names);
  if (call.positional.size() > names.size()) {
    throw UserError(call.name + "() takes at most " + std::to_string(names.size()) + " arguments");
  }
  std::vector<const Value*> bound(names.size(), nullptr);
  for (size_t i = 0; i < call.positional.size(); ++i) bound[i] = &call.positional[i];
  for (const auto& [name, value] : call.named) {
    size_t index = static_cast<size_t>(std::find(names.begin(), names.end(), name) - names.begin());
    if (bound[index]) throw UserError(call.name + "(): " + name + " is given twice");
    bound[index] = &value;
  }
  return bound;
}

Value call_cast(const Call& call) {
  refuse_named(call, {"value"});
  std::vector<Value> values = call.positional;
  for (const auto& [name, value] : call.named) values.push_back(value);
  if (values.empty()) throw UserError(call.name + "() takes a value");
  Value whole = values.size() == 1 ? values[0] : sweep_value(Sweep::Kind::choice, values, true);
  if (call.name == "int") return cast(whole, call.name, to_integer);
  if (call.name == "float") return cast(whole, call.name, to_real);
  if (call.name == "str") return cast(whole, call.name, to_text);
  return cast(whole, call.name, to_boolean);
}

Value call_choice(const Call& call) {
  refuse_named(call, {});
  if (call.positional.empty()) throw UserError("choice() takes at least one value");
  for (const auto& value : call.positional) {
    if (value.holds_sweep()) throw UserError("choice() cannot hold another sweep");
  }
  return sweep_value(Sweep::Kind::choice, call.positional, false);
}

Value call_range(const Call& call) {
  std::vector<const Value*> bound = bind(call, {"start", "stop", "step"});
  if (!bound[1] && bound[0]) std::swap(bound[0], bound[1]);
  if (!bound[1]) throw UserError("range() takes stop, or start, stop and an optional step");
  std::vector<Value> values = {bound[0] ? *bound[0] : integer_value(0), *bound[1],
                               bound[2] ? *bound[2] : integer_value(1)};
  for (const auto& value : values) {
    if (!is_number(value) || !std::isfinite(number(value)))
      throw UserError("range() takes numbers");
  }
  if (number(values[2]) == 0) throw UserError("range(): the step is 0");
  return sweep_value(Sweep::Kind::range, values, false);
}

std::vector<std::string> patterns(const Value* value, const std::string& name) {
  std::vector<std::string> result;
  if (!value) return result;
  std::vector<Value> items = value->kind == VK::list ? value->items : std::vector{*value};
  for (const auto& item : items) {
    if (item.kind != VK::text)
      throw UserError("glob(): " + name + " takes a pattern or a list of patterns");
    result.push_back(item.text);
  }
  return result;
}

Value call_glob(const Call& call) {
  std::vector<const Value*> bound = bind(call, {"include", "exclude"});
  if (!bound[0]) throw UserError("glob() takes a pattern");
  Value value = sweep_value(Sweep::Kind::glob, {}, false);
  value.sweep->include = patterns(bound[0], "include");
  value.sweep->exclude = patterns(bound[1], "exclude");
  return value;
}

Value call_interval(const Call& call) {
  std::vector<const Value*> bound = bind(call, {"start", "end"});
  if (!bound[0] || !bound[1] || !is_number(*bound[0]) || !is_number(*bound[1])) {
    throw UserError("interval() takes two numbers");
  }
  return sweep_value(Sweep::Kind::interval, {*bound[0], *bound[1]}, false);
}

Value call_tag(const Call& call) {
  refuse_named(call, {"tags", "sweep"});
  const Value* last = call.positional.empty() ? nullptr : &call.positional.back();
  for (const auto& [name, value] : call.named) {
    if (name == "sweep") last = &value;
  }
  if (!last || last->kind != VK::sweep)
    throw UserError("the last argument of tag() is a choice(), range() or interval()");
  return *last;
}

bool less(const Value& a, const Value& b) {
  auto numeric = [](const Value& value) { return is_number(value) || value.kind == VK::boolean; };
  auto as_number = [](const Value& value) {
    return value.kind == VK::boolean ? double(value.boolean) : number(value);
  };
  if (numeric(a) && numeric(b)) return as_number(a) < as_number(b);
  if (a.kind == VK::text && b.kind == VK::text) return a.text < b.text;
  throw UserError("sort() compares numbers with numbers and texts with texts, found " +
                  a.written() + " and " + b.written());
}

std::vector<Value> sorted(std::vector<Value> values, bool reverse) {
  for (size_t i = 1; i < values.size(); ++i) less(values[0], values[i]);  // refuses a mixture first
  std::stable_sort(values.begin(), values.end(), [&](const Value& a, const Value& b) {
    return reverse ? less(b, a) : less(a, b);
  });
  return values;
}

/// Fisher and Yates with a fixed linear congruential sequence.
std::vector<Value> shuffled(std::vector<Value> values) {
  uint64_t state = 0x9e3779b97f4a7c15ULL;
  for (size_t i = values.size(); i > 1; --i) {
    state = state * 6364136223846793005ULL + 1442695040888963407ULL;
    std::swap(values[i - 1], values[(state >> 33) % i]);
  }
  return values;
}

/// sort and shuffle: of a list a list, of a sweep a sweep, of several arguments a sweep.
Value reorder(const Call& call,
              const std::function<std::vector<Value>(std::vector<Value>)>& order) {
  if (call.positional.empty()) throw UserError(call.name + "() takes values");
  if (call.positional.size() > 1) {
    return sweep_value(Sweep::Kind::choice, order(call.positional), true);
  }
  const Value& only = call.positional[0];
  if (only.kind == VK::sweep) {
    return sweep_value(Sweep::Kind::choice, order(sweep_members(*only.sweep)), only.sweep->simple);
  }
  if (only.kind != VK::list && call.name == "sort") return only;
  Value list = make_value(VK::list);
  list.items = order(only.kind == VK::list ? only.items : std::vector{only});
  return list;
}

Value call_sort(const Call& call) {
  bool reverse = false;
  Call rest{.name = call.name, .positional = call.positional, .named = {}};
  for (const auto& [name, value] : call.named) {
    if (name == "reverse" && value.kind == VK::boolean) {
      reverse = value.boolean;
    } else if ((name == "list" || name == "sweep") && rest.positional.empty()) {
      rest.positional.push_back(value);
    } else {
      throw UserError("sort() takes values and reverse=true|false, found " + name);
    }
  }
  if (!rest.positional.empty() && rest.positional[0].kind == VK::list &&
      rest.positional.size() > 1) {
    throw UserError("sort() takes one list, or several values");
  }
  return reorder(rest,
                 [&](std::vector<Value> values) { return sorted(std::move(values), reverse); });
}

Value call_shuffle(const Call& call) {
  Call rest{.name = call.name, .positional = call.positional, .named = {}};
  refuse_named(call, {"list", "sweep"});
  for (const auto& [name, value] : call.named) rest.positional.push_back(value);
  return reorder(rest, shuffled);
}

}  // namespace

std::vector<Value> sweep_members(const Sweep& sweep) {
  if (sweep.kind == Sweep::Kind::choice) return sweep.values;
  if (sweep.kind == Sweep::Kind::interval) {
    throw UserError("interval() has no members to try one by one; use range() or choice()");
  }
  if (sweep.kind == Sweep::Kind::glob)
    throw UserError("glob() takes its members from a group: group=glob(*)");
  const Value &start = sweep.values[0], &stop = sweep.values[1], &step = sweep.values[2];
  bool integral = std::all_of(sweep.values.begin(), sweep.values.end(),
                              [](const Value& value) { return value.kind == VK::integer; });
  // Quadruple precision keeps the sum's rounding out of the members, as decimal arithmetic would.
  __float128 at =
      integral ? static_cast<__float128>(start.integer) : static_cast<__float128>(number(start));
  __float128 end =
      integral ? static_cast<__float128>(stop.integer) : static_cast<__float128>(number(stop));
  __float128 by =
      integral ? static_cast<__float128>(step.integer) : static_cast<__float128>(number(step));
  std::vector<Value> members;
  for (; by > 0 ? at < end : at > end; at += by) {
    if (members.size() == kMaximumRange) throw UserError("range() has more than 10000 members");
    members.push_back(integral ? integer_value(static_cast<int64_t>(at))
                               : real_value(static_cast<double>(at)));
  }
  return members;
}

Value call_function(const Call& call) {
  if (call.name == "int" || call.name == "float" || call.name == "str" || call.name == "bool")
    return call_cast(call);
  if (call.name == "choice") return call_choice(call);
  if (call.name == "range") return call_range(call);
  if (call.name == "glob") return call_glob(call);
  if (call.name == "interval") return call_interval(call);
  if (call.name == "tag") return call_tag(call);
  if (call.name == "sort") return call_sort(call);
  if (call.name == "shuffle") return call_shuffle(call);
  throw UserError("unknown function " + call.name + "()" + suggestion(call.name, kFunctions));
}

}  // namespace espalier::config
