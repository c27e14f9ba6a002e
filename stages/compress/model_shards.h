#pragma once
/// A model that stores what differs from its base.

#include <filesystem>
#include <functional>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "pipeline/model/sequence_head.h"

namespace espalier::compress {

/// Replaces `directory` by a derived model: the planned tensors, each made when its turn comes, in
/// files of at most 1 GiB (changed-00001.safetensors, ...), and what its classes are called where
/// that is said.
void write_changed_model(const io::Checkpoint& base, const std::vector<io::TensorPlan>& plan,
                         const std::function<at::Tensor(size_t index)>& tensor,
                         const model::ClassNames& labels, const std::filesystem::path& directory);

}  // namespace espalier::compress
