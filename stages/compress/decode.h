#pragma once
/// A residual on its base: the fine-tuned model again (`espalier decode BASE RESIDUAL OUT`).

#include <filesystem>
#include <functional>

#include "pipeline/io/checkpoint.h"
#include "stages/compress/residual_file.h"

namespace espalier::compress {

/// Throws UserError with both checksums when `base` is not the model the residual was taken
/// against, or lacks a tensor, or holds one of another shape. `file` is named in the message.
void require_base(const io::Checkpoint& base, const Residual& residual,
                  const std::filesystem::path& file);

/// What the residual changes, one tensor at a time in the file's order: matrices decoded onto the
/// base, whole tensors as they are; floating-point tensors in the residual's dtype.
void for_each_decoded(const io::Checkpoint& base, const Residual& residual,
                      const std::function<void(const std::string& name, const at::Tensor&)>& use);

/// Writes the decoded model as a dense checkpoint: the base's configuration and tokenizer beside
/// it. One matrix in memory at a time, beside the residual; on the disk twice what changed, for a
/// while.
void decode_residual(const std::filesystem::path& base_directory,
                     const std::filesystem::path& residual_file,
                     const std::filesystem::path& out_directory);

}  // namespace espalier::compress
