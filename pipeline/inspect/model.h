#pragma once
/// A checkpoint: its tensors, how sparse they are, and what they stand on.

#include <filesystem>

#include "pipeline/inspect/inspection.h"

namespace espalier::inspect {

/// {"kind": "model", "architecture", "parameters", "nonzeros", "sparsity", "bytes", "stands_on",
/// "heads_removed", "matrices_with_terms", "made_by", "tensors": [{"name", "shape", "dtype",
/// "sparsity", "pattern"}]}; keys without content are left out. One read of all tensors.
Facts describe_model(const std::filesystem::path& path);

}  // namespace espalier::inspect
