#pragma once
/// Tables for a terminal.

#include <string>
#include <vector>

namespace espalier::driver {

/// Lines of cells padded to the widest of their column, two spaces apart, each line behind
/// `indent`. Cells are UTF-8; the rows have equally many.
std::string text_table(const std::vector<std::vector<std::string>>& rows,
                       const std::string& indent = "");

/// A row about a matrix of a block: named `prefix`, the block, `suffix`.
struct BlockRow {
  int64_t block = 0;
  std::string prefix, suffix;  ///< "model.layers.", ".self_attn.q_proj"
  std::vector<std::string> cells;
};
/// Rows that differ in their block alone become one, whose name holds the blocks as ranges:
/// "model.layers.0-2,5.self_attn.q_proj". In the order of the first row of each.
std::vector<std::vector<std::string>> folded_rows(const std::vector<BlockRow>& rows);

}  // namespace espalier::driver
