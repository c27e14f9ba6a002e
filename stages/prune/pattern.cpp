#include "stages/prune/pattern.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>

#include "pipeline/errors.h"

namespace espalier::prune {
namespace {

constexpr int64_t kLargestGroup = 64;

bool whole_number(const std::string& text, int64_t& value) {
  const char* end = text.data() + text.size();
  const auto parsed = std::from_chars(text.data(), end, value);
  return parsed.ec == std::errc() && parsed.ptr == end;
}

}  // namespace

int64_t Pattern::removed_of(int64_t entries) const {
  return static_cast<int64_t>(std::floor(static_cast<double>(entries) * sparsity));
}

std::string Pattern::name() const {
  if (heads > 0) return "heads";
  return unstructured() ? "unstructured" : fmt::format("{}:{}", keep, group);
}

Pattern parse_pattern(const std::string& text, double sparsity_when_unstructured) {
  Pattern pattern;
  pattern.sparsity = sparsity_when_unstructured;
  if (text == "unstructured") return pattern;
  const size_t colon = text.find(':');
  const bool legal = colon != std::string::npos &&
                     whole_number(text.substr(0, colon), pattern.keep) &&
                     whole_number(text.substr(colon + 1), pattern.group) && pattern.keep >= 1 &&
                     pattern.keep < pattern.group && pattern.group <= kLargestGroup;
  if (!legal)
    throw UserError(
        fmt::format("pattern \"{}\" is not one of: unstructured, heads, or K:M with 1 <= K < M <= "
                    "{} (K weights kept "
                    "of every M consecutive inputs, quoted in a file: \"2:4\")",
                    text, kLargestGroup));
  pattern.sparsity = 1.0 - static_cast<double>(pattern.keep) / static_cast<double>(pattern.group);
  return pattern;
}

}  // namespace espalier::prune
