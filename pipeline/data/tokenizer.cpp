#include "pipeline/data/tokenizer.h"

#include <fmt/format.h>

#include "pipeline/errors.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/hdf5.h"

namespace espalier::data {

bool require_tokenizer(const std::filesystem::path& set, const std::filesystem::path& tokenizer) {
  const io::Hdf5Reader reader(set);
  const std::string made_by = reader.has_attribute("/", "tokenizer_checksum")
                                  ? reader.text_attribute("/", "tokenizer_checksum")
                                  : std::string();
  if (made_by.empty()) return false;
  const std::string expected = io::file_sha256(tokenizer);
  if (made_by == expected) return true;
  throw UserError(fmt::format(
      "{}: was made by another tokenizer (SHA-256 {}) than {} (SHA-256 {}), so its tokens mean "
      "other words; make the set again: launch/prepare_data.py --tokenizer {}",
      set.string(), made_by, tokenizer.string(), expected, tokenizer.parent_path().string()));
}

}  // namespace espalier::data
