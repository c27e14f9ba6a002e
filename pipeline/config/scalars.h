#pragma once
/// How a bare word becomes a value: in a YAML file (YAML 1.1 as OmegaConf's loader reads it) and in
/// an override or an interpolation's argument (the grammar of Hydra and OmegaConf).

#include <optional>
#include <string>
#include <string_view>

#include "pipeline/config/node.h"

namespace espalier::config {

/// YAML 1.1: yes/on are booleans, 2:4 is 124 (base 60), 1_000, 017 and 0x1F are integers, 1e3 is a
/// float, ~ is null, dates stay strings. Throws UserError without a place for integers beyond 64
/// bits and for texts that YAML gives a type but no value ("0x_", "=").
NodePtr yaml_scalar(const std::string& text);
/// The value under an explicit tag (!!int "3"); `tag` is the full "tag:yaml.org,2002:int".
NodePtr yaml_tagged_scalar(const std::string& tag, const std::string& text);

/// Override grammar: decimal integers with single underscores, floats, inf, nan, true, null in any
/// case; nullptr when the word is a string.
NodePtr grammar_scalar(const std::string& text);

/// [A-Za-z_][A-Za-z0-9_-]*
bool is_identifier(std::string_view text);
/// Python's int(text) and float(text) without underscores checks; nullopt when it is not a number.
std::optional<double> parse_double(std::string text);

}  // namespace espalier::config
