#pragma once
/// What pruning leaves of each block, written when the block is done: the journal that a restarted
/// run goes on from, and the parts of the stage's artifacts.
///
///   model/block-00007.safetensors   the block's pruned weights, in the model's dtype, by the
///                                   checkpoint's tensors (pipeline/model/stored_layers.h)
///   model/ends.safetensors          the pooler's, which counts as one more block here
///   state/mask-00007.safetensors    masks by matrix, one bit a weight (1: pruned)
///   masks.h5                        all masks: uint8 [rows, ceil(columns / 8)], most significant
///                                   bit first, attribute columns; kind "espalier.masks"; written
///                                   when every block is done

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <span>
#include <vector>

#include "pipeline/driver/stage.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"
#include "stages/prune/matrix_pruning.h"

namespace espalier::prune {

/// Bits that are 1 of uint8 [...].
int64_t count_bits(const at::Tensor& packed);

class BlockFiles {
 public:
  /// Of a model with this architecture that derives from `base`.
  BlockFiles(const driver::StageContext& context, const model::Architecture& architecture,
             const io::Checkpoint& base);

  /// Blocks 0 .. done-1 are on disk whole (the same answer on every rank; collective).
  int64_t finished_blocks(const comm::Communicator& group, int64_t blocks) const;
  /// Written by rank 0: `tasks` named by their weights (Architecture::weight_name). `report`: an
  /// object of what a reader may want to know of the block.
  void write(int64_t block, std::span<const MatrixTask> tasks, at::ScalarType dtype,
             const nlohmann::json& report) const;
  /// The reports of all blocks, those of earlier starts too.
  std::vector<nlohmann::json> reports(int64_t blocks) const;
  /// masks.h5 from the journal, and the matrices' zeros: [{name, rows, columns, zeros, sparsity}].
  nlohmann::json assemble_masks(int64_t blocks) const;
  std::filesystem::path model_directory() const { return directory_ / "model"; }
  /// The written weights of `block`, by the checkpoint's tensor names.
  std::filesystem::path weights_file(int64_t block) const;
  /// What belongs to no block and is to outlive a stop; removed when the stage is finished.
  std::filesystem::path state_file(const std::string& name) const { return state_ / name; }

 private:
  std::filesystem::path mask_file(int64_t block) const;

  std::filesystem::path directory_, state_;
  const model::Architecture& architecture_;
  const io::Checkpoint& base_;
};

}  // namespace espalier::prune
