#pragma once
/// Which attention heads a model has where pruning removed some.
///
/// A derived model directory may hold heads.json, {"heads": [[0, 1, 3], ...]}: by block the query
/// heads that stay, ascending, by config.json's numbers. The nearest directory of the chain that
/// has one counts. The matrices of such a model are smaller: q, k and v have the rows of these
/// heads, the output projection their columns. With grouped queries a key/value head stays while
/// one of its query heads does.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <vector>

#include "pipeline/io/checkpoint.h"

namespace espalier::model {

inline constexpr const char* kHeadsFile = "heads.json";

/// By block; empty: every block has all heads.
using KeptHeads = std::vector<std::vector<int64_t>>;

/// The heads of one block, by config.json's numbers.
struct BlockHeads {
  std::vector<int64_t> query, key_value;  ///< ascending
  std::vector<int64_t> key_value_of;      ///< of each query head: which of `key_value`

  int64_t queries() const { return static_cast<int64_t>(query.size()); }
  int64_t key_values() const { return static_cast<int64_t>(key_value.size()); }
  /// As many query heads to each key/value head, one after another: what config.json can say.
  bool shared_evenly() const;
};

/// `kept` of `heads` query heads, of which heads / key_value_heads share a key/value head.
BlockHeads block_heads(const std::vector<int64_t>& kept, int64_t heads, int64_t key_value_heads);

/// heads.json of the checkpoint's chain; empty when there is none. The file is hostile: throws
/// UserError naming it and what is wrong.
KeptHeads read_kept_heads(const io::Checkpoint& checkpoint, int64_t blocks, int64_t heads);
void write_kept_heads(const std::filesystem::path& directory, const KeptHeads& heads);

/// Features of these heads along a dimension of heads * size features: int64 [heads.size() * size].
at::Tensor features_of(const std::vector<int64_t>& heads, int64_t size);

}  // namespace espalier::model
