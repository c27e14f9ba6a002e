#pragma once
/// Whether a token set and a model have the same tokenizer. prepare_data.py leaves the SHA-256 of
/// tokenizer.json in the set's attribute tokenizer_checksum.

#include <filesystem>

namespace espalier::data {

/// Throws UserError naming both files and the way out when the set was made by another tokenizer
/// than this tokenizer.json; false when the set does not say by which. Reads one attribute and the
/// tokenizer's file.
bool require_tokenizer(const std::filesystem::path& set, const std::filesystem::path& tokenizer);

}  // namespace espalier::data
