#pragma once
/// pattern heads: whole attention heads leave the model (DSEE, arXiv 2111.00160, structured).
///
///   model/block-00007.safetensors  q, k, v (rows, biases) and the output projection (columns)
///                                  without them, and what stands beside these matrices; in the
///                                  types they had
///   model/heads.json               which heads stay (pipeline/model/heads.h)
///   adapters.h5                    the adapter beside the model, where it has one (lora, dsee,
///                                  lora_xs; of another the pruning is refused): without what left
///   state/heads-00007.json         what was decided; it says that the block is done

#include <nlohmann/json.hpp>

#include "pipeline/driver/stage.h"
#include "stages/prune/method.h"

namespace espalier::prune {

/// Throws UserError with both numbers when a block has not more than `count` query heads.
void require_heads(const model::Architecture& architecture, int64_t count);

/// Removes the `count` query heads of every block that `method` scores lowest (ties: the lower
/// head), with the key/value heads that no head reads any more. A block is a unit: they are dealt
/// over ranks and workers, and a run that was cut off goes on behind the finished ones. Returns the
/// metrics on rank 0: {"heads", "blocks": [{"kept", "removed", "scores"}]}. Collective; one read of
/// the attention's matrices.
nlohmann::json remove_heads(driver::StageContext& context, const PruningMethod& method,
                            const io::Checkpoint& checkpoint,
                            const model::Architecture& architecture, int64_t count);

}  // namespace espalier::prune
