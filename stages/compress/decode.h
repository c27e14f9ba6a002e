#pragma once
/// A residual on its base: the fine-tuned model again (`espalier decode BASE RESIDUAL... OUT`).

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "pipeline/io/checkpoint.h"
#include "stages/compress/residual_file.h"

namespace espalier::compress {

/// Throws UserError with both checksums when `base` is not the model the residual was taken
/// against, or lacks a tensor, or holds one of another shape. `file` is named in the message.
void require_base(const io::Checkpoint& base, const Residual& residual,
                  const std::filesystem::path& file);

/// What a residual changes, a tensor at a time: matrices decoded onto the base (with the rows added
/// behind them), whole tensors as they are, and tied tensors as what they are tied to.
class Decoder {
 public:
  /// Both outlive the decoder. Throws UserError when a tied tensor is tied to none.
  Decoder(const io::Checkpoint& base, const Residual& residual);
  /// Names and shapes of the tensors, floating-point ones in the residual's dtype.
  const std::vector<io::TensorPlan>& plan() const { return plan_; }
  /// Tensor `i` of the plan; floating-point ones in `floating`, rounded once.
  at::Tensor decode(size_t i, at::ScalarType floating) const;

 private:
  at::Tensor decode_rows(const std::string& name, at::ScalarType floating) const;
  at::Tensor decode_named(const std::string& name, at::ScalarType floating) const;
  const io::Checkpoint& base_;
  const Residual& residual_;
  std::map<std::string, size_t> matrices_, added_, whole_;
  std::vector<io::TensorPlan> plan_;
};

/// Writes the decoded model as a dense checkpoint: the base's tokenizer and configuration beside
/// it, the latter with what the decoded tensors ask for (pipeline/model/config_keys.h). Several
/// residuals of one base are summed (see sum.h). One matrix in memory at a time, beside the
/// residuals; on the disk twice what changed, for a while. Throws UserError for a directory that
/// holds a model which is no export or decoding of espalier (io::require_overwritable).
void decode_residuals(const std::filesystem::path& base_directory,
                      const std::vector<std::filesystem::path>& residual_files,
                      const std::filesystem::path& out_directory);

}  // namespace espalier::compress
