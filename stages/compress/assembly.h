#pragma once
/// residual.h5 and the decoded model from a complete journal.

#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "stages/compress/compressor.h"
#include "stages/compress/journal.h"
#include "stages/compress/pairs.h"

namespace espalier::compress {

struct Assembly {
  const io::Checkpoint& base;
  const std::string& base_checksum;
  const std::filesystem::path& directory;  ///< receives residual.h5 and model/
  const Journal& journal;
  const std::vector<MatrixPair>& matrices;
  /// 0: the matrix stays the base's. Empty where nothing is truncated.
  const std::vector<int64_t>& truncation_ranks;
  const Settings& settings;
  const std::vector<WholeTensor>& whole;
  const std::vector<WholeTensor>& added;
  const std::vector<TiedTensor>& tied;
  const model::ClassNames& labels;
  std::function<void()> still_working;  ///< called after every tensor: the other ranks wait
};

/// Writes both (the model streams from the journal, in shards of at most 1 GiB) and returns
/// {"bytes", "whole_tensors", "whole_bytes", "mask_preserving", "matrices": [...]}. One rank.
nlohmann::json assemble(const Assembly& assembly);

}  // namespace espalier::compress
