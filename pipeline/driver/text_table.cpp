#include "pipeline/driver/text_table.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

namespace espalier::driver {
namespace {

/// Columns on a screen: bytes that begin a character.
size_t width_of(const std::string& text) {
  return static_cast<size_t>(
      std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xC0) != 0x80; }));
}

/// "0-2,5" of ascending numbers.
std::string ranges_of(const std::vector<int64_t>& numbers) {
  std::vector<std::string> parts;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    parts.push_back(last == i ? fmt::format("{}", numbers[i])
                              : fmt::format("{}-{}", numbers[i], numbers[last]));
    i = last + 1;
  }
  return fmt::format("{}", fmt::join(parts, ","));
}

}  // namespace

std::string text_table(const std::vector<std::vector<std::string>>& rows,
                       const std::string& indent) {
  std::vector<size_t> widths;
  for (const auto& row : rows) {
    widths.resize(std::max(widths.size(), row.size()));
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], width_of(row[i]));
  }
  std::string text;
  for (const auto& row : rows) {
    std::string line = indent;
    for (size_t i = 0; i < row.size(); ++i)
      line += row[i] + std::string(widths[i] - width_of(row[i]) + 2, ' ');
    text += line.substr(0, line.find_last_not_of(' ') + 1) + "\n";
  }
  return text;
}

std::vector<std::vector<std::string>> folded_rows(const std::vector<BlockRow>& rows) {
  struct Fold {
    const BlockRow* first;
    std::vector<int64_t> blocks;
  };
  std::vector<Fold> folds;
  for (const BlockRow& row : rows) {
    const auto same = std::find_if(folds.begin(), folds.end(), [&](const Fold& fold) {
      return fold.first->prefix == row.prefix && fold.first->suffix == row.suffix &&
             fold.first->cells == row.cells;
    });
    if (same == folds.end())
      folds.push_back({&row, {row.block}});
    else
      same->blocks.push_back(row.block);
  }
  std::vector<std::vector<std::string>> result;
  for (Fold& fold : folds) {
    std::sort(fold.blocks.begin(), fold.blocks.end());
    result.push_back({fold.first->prefix + ranges_of(fold.blocks) + fold.first->suffix});
    result.back().insert(result.back().end(), fold.first->cells.begin(), fold.first->cells.end());
  }
  return result;
}

}  // namespace espalier::driver
