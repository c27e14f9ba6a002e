#pragma once
/// Some of a checkpoint's tensors.

#include <filesystem>
#include <functional>
#include <string>

#include "pipeline/io/checkpoint.h"

namespace espalier::io {

using NameTest = std::function<bool(const std::string& tensor)>;

/// Checkpoint::tensors_checksum of the tensors that `included` accepts. Costs one read of them.
std::string tensors_checksum(const Checkpoint& model, const NameTest& included);

/// write_dense without the tensors that `left_out` accepts.
void write_dense_without(const Checkpoint& model, const std::filesystem::path& directory,
                         at::ScalarType dtype, const NameTest& left_out,
                         int64_t shard_bytes = int64_t{5} << 30);

}  // namespace espalier::io
