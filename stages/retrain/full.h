#pragma once
/// Training whole tensors: every weight of the targets, norms, embeddings and biases among them.
///
/// mask: fixed    a pruned matrix is trained inside its zeros (with merge: dense, outside too)
///       ste      the matrix acts with a mask chosen anew in each step from the weights' sizes; the
///                gradient of what acts goes to all weights (straight through; the mask of SPP,
///                arXiv 2405.16057, eq. 2)
///       sr_ste   and weights outside the mask decay: their gradient gets decay * w (arXiv
///                2102.04010, eq. 8)
///
/// One product forward, two backward. Memory: a float32 weight and its gradient's sum (8 bytes a
/// worker), two moments, and the matrix that acts.

#include <memory>

#include "stages/retrain/adapter.h"

namespace espalier::retrain {

struct FullOptions {
  enum class Mask { fixed, ste, sr_ste };
  Mask mask = Mask::fixed;
  /// ste, sr_ste: K of every M inputs of a row are kept; 0:0 is unstructured.
  int64_t keep = 0, group = 0;
  std::optional<double> sparsity;  ///< unstructured, of every matrix; nothing: as it comes
  double decay = 2e-4;
};

std::unique_ptr<AdapterMethod> make_full(const FullOptions& options);

/// bool [rows, columns]: what a mask keeps of `weight` (float32). Unstructured: all but the
/// floor(sparsity * size) smallest magnitudes; K:M: the K largest of every M consecutive inputs of
/// a row. Ties fall to the lower index. Throws nothing; columns must be a multiple of M.
at::Tensor chosen_mask(const at::Tensor& weight, int64_t keep, int64_t group, double sparsity);

}  // namespace espalier::retrain
