#include "pipeline/driver/token_sets.h"

#include <fmt/format.h>

#include <cstdio>

#include "pipeline/data/tokenizer.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/checksum.h"

namespace espalier::driver {

TokenSetChecksums checksums_of_token_sets(const std::vector<Entry>& entries,
                                          const RunContext& run) {
  TokenSetChecksums checksums;
  for (const auto& entry : entries)
    for (const auto& set : entry.stage->token_sets(run))
      if (!set.empty() && !checksums.contains(set)) checksums[set] = io::file_checksum(set);
  return checksums;
}

void require_tokenizer(const TokenSetChecksums& sets, const RunContext& run,
                       const std::filesystem::path& model) {
  if (!run.group.is_root()) return;
  const std::filesystem::path tokenizer = io::Checkpoint::open(model).root() / "tokenizer.json";
  if (!std::filesystem::exists(tokenizer)) return;
  for (const auto& [set, checksum] : sets)
    if (!data::require_tokenizer(set, tokenizer))
      fmt::print("{}: does not say by which tokenizer it was made; taken to be {}\n", set.string(),
                 tokenizer.string());
  std::fflush(stdout);
}

}  // namespace espalier::driver
