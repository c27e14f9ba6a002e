#pragma once
/// The pass of the calibration sequences through the dense model that OWL's allocation needs.

#include <filesystem>
#include <vector>

#include "pipeline/driver/stage.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"
#include "stages/prune/options.h"

namespace espalier::prune {

/// What OWL gives a block.
struct BlockAllocation {
  double outlier_ratio = 0, sparsity = 0;
};

/// By block. Matrices that an override names neither count nor get it. `journal`: written by rank 0
/// when the pass is done; a later start reads it in place of the pass. Collective. Costs a block's
/// forward pass of every sequence twice. Throws Requeue when asked to stop.
std::vector<BlockAllocation> allocate_by_owl(driver::StageContext& context, const Options& options,
                                             const model::Architecture& architecture,
                                             const io::Checkpoint& checkpoint,
                                             const std::filesystem::path& journal);

}  // namespace espalier::prune
