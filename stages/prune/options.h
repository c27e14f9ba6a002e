#pragma once
/// What the `prune` node of a configuration asks for.

#include <cstdint>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "pipeline/model/architecture.h"
#include "stages/prune/pattern.h"

namespace espalier::prune {

enum class Method { magnitude, wanda, sparsegpt };

struct Options {
  Method method = Method::wanda;
  std::string method_name;
  Pattern pattern;
  int64_t samples = 128, sequence_length = 2048;
  int64_t unit = 1;  ///< calibration sequences computed as one
  int64_t block_size = 128;
  double damping = 0.01;
  bool keep_zeros = true;
  std::vector<std::string> include, exclude;  ///< globs; empty include: every linear layer

  bool needs_calibration() const { return method != Method::magnitude; }
  int64_t units() const { return (samples + unit - 1) / unit; }
};

/// Throws UserError placed at the key: out of range, contradictory, or not supported.
Options read_options(const config::Section& section);

/// The linear layers of a block that are pruned: a glob matches a layer's whole name in this block,
/// its name inside the block ("mlp.down_proj") or that name's last part ("down_proj").
std::vector<const model::Linear*> chosen_layers(const Options& options,
                                                const model::Architecture& architecture,
                                                int64_t block);

/// Throws UserError for a glob that matches no layer of the model, and for a pattern that does not
/// divide a chosen layer's inputs.
void require_layers(const Options& options, const model::Architecture& architecture);

}  // namespace espalier::prune
