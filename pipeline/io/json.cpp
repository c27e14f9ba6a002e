#include "pipeline/io/json.h"

#include <fmt/format.h>

#include <limits>
#include <set>
#include <vector>

#include "pipeline/errors.h"

namespace espalier::io {
namespace {

/// First pass over the text: finds what the parser itself would let through (depth, double keys) or
/// would throw (syntax), and stops at the first of them.
class Inspector : public nlohmann::json_sax<nlohmann::json> {
 public:
  explicit Inspector(int max_depth) : max_depth_(max_depth) {}
  std::string problem;

  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return enter(); }
  bool end_object() override { return leave(); }
  bool start_array(std::size_t) override { return enter(); }
  bool end_array() override { return leave(); }

  bool key(string_t& name) override {
    if (keys_.back().insert(name).second) return true;
    problem = fmt::format("the name \"{}\" stands twice in one object", name);
    return false;
  }

  bool parse_error(std::size_t position, const std::string&,
                   const nlohmann::detail::exception& error) override {
    problem = fmt::format("is not valid JSON at byte {}: {}", position, error.what());
    return false;
  }

 private:
  bool enter() {
    keys_.emplace_back();
    if (static_cast<int>(keys_.size()) <= max_depth_) return true;
    problem = fmt::format("is nested deeper than {} levels", max_depth_);
    return false;
  }
  bool leave() {
    keys_.pop_back();
    return true;
  }

  int max_depth_;
  std::vector<std::set<std::string>> keys_;
};

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& origin, int max_depth) {
  Inspector inspector(max_depth);
  if (!nlohmann::json::sax_parse(text.begin(), text.end(), &inspector)) {
    throw UserError(
        fmt::format("{}: {}; the file is damaged or not what its name says, copy it again", origin,
                    inspector.problem));
  }
  return nlohmann::json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
}

int64_t non_negative_integer(const nlohmann::json& value) {
  if (!value.is_number_unsigned()) return -1;
  const auto number = value.get<uint64_t>();
  return number <= static_cast<uint64_t>(std::numeric_limits<int64_t>::max())
             ? static_cast<int64_t>(number)
             : -1;
}

nlohmann::json value_at(const nlohmann::json& object, std::initializer_list<const char*> keys) {
  const nlohmann::json* value = &object;
  for (const char* key : keys) {
    if (!value->is_object() || !value->contains(key)) return nullptr;
    value = &value->at(key);
  }
  return *value;
}

std::string text_at(const nlohmann::json& object, std::initializer_list<const char*> keys) {
  const nlohmann::json value = value_at(object, keys);
  return value.is_string() ? value.get<std::string>() : "";
}

}  // namespace espalier::io
