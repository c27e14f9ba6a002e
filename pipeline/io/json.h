#pragma once
/// JSON from outside, parsed so that nothing surprising comes in: bounded nesting, no key twice in
/// one object, valid UTF-8, and no exception of the JSON library.

#include <cstdint>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace espalier::io {

/// Parses `text`; throws UserError starting with `origin` (the file, and what of it).
nlohmann::json parse_json(std::string_view text, const std::string& origin, int max_depth = 64);

/// The value as an integer >= 0, or -1 when it is anything else (a float, a negative number, an
/// integer beyond int64).
int64_t non_negative_integer(const nlohmann::json& value);

/// What stands under the keys, one inside the other; null where any is absent or stands in no
/// object. A copy. Never throws.
nlohmann::json value_at(const nlohmann::json& object, std::initializer_list<const char*> keys);
/// The text there; empty where there is none.
std::string text_at(const nlohmann::json& object, std::initializer_list<const char*> keys);

}  // namespace espalier::io
