#pragma once
/// A checkpoint: its tensors, how sparse they are, and what they stand on.

#include <filesystem>

#include "pipeline/inspect/inspection.h"

namespace espalier::inspect {

/// {"kind": "model", "parameters", "nonzeros", "sparsity", "bytes", "stored_bytes", "architecture",
/// "blocks", "heads_removed", "stands_on", "matrices_with_terms", "made_by", "tensors": [{"name",
/// "shape", "dtype", "bytes", "nonzeros", "sparsity", "pattern", "packing", "stored_bytes"}]};
/// keys of the model without content are left out, "packing" and "stored_bytes" where nothing is
/// packed. One read of all tensors.
Facts describe_model(const std::filesystem::path& path);

}  // namespace espalier::inspect
