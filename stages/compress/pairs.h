#pragma once
/// Which tensors of a fine-tuned model are compressed as matrices, which are stored whole, and
/// which cost nothing.

#include <algorithm>
#include <string>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/workers.h"
#include "stages/compress/residual_file.h"

namespace espalier::compress {

/// A pair of tensors of two or more dimensions that differ: the fine-tuned one's first rows, as
/// many as the base has.
struct MatrixPair {
  std::string name;
  std::vector<int64_t> shape;
  int64_t rows = 0, columns = 0;  ///< folded
  bool mask_preserving = false;   ///< the base has zeros and the fine-tuned tensor keeps them all
  bool fills_zeros =
      false;  ///< a sixteenth of the fine-tuned tensor or more is zero where the base is not

  /// What its decomposition costs, up to a constant.
  double predicted_cost() const {
    return double(rows) * double(columns) * double(std::min(rows, columns));
  }
};

/// Throws UserError naming the tensor and both shapes when a name stands for two shapes (but for
/// rows added to a matrix or a vector), or when the fine-tuned model lacks a tensor of the base
/// (nothing could take it away again).
/// Also when both have lost attention heads (pipeline/model/heads.h), and not the same ones.
void require_comparable(const io::Checkpoint& base, const io::Checkpoint& fine_tuned);

/// The first rows of a fine-tuned tensor that has more of them than the base's shape says.
at::Tensor common_rows(const at::Tensor& fine_tuned, const std::vector<int64_t>& base_shape);

/// Rows that the fine-tuned model added to matrices of the base (tokens of an embedding), but those
/// in `tied`. By name.
std::vector<WholeTensor> added_rows(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
                                    const std::vector<TiedTensor>& tied);

/// Tensors of two or more dimensions that differ from the base's (or that it does not have) and
/// equal another tensor of the fine-tuned model, of a smaller name (a head tied to its embedding).
/// They cost nothing but their names.
std::vector<TiedTensor> tied_tensors(const io::Checkpoint& base, const io::Checkpoint& fine_tuned);

/// The pairs that differ, by name, but those in `tied`. Reads both models once, spread over ranks
/// and workers. Collective.
std::vector<MatrixPair> changed_matrices(const io::Checkpoint& base,
                                         const io::Checkpoint& fine_tuned,
                                         const std::vector<TiedTensor>& tied,
                                         const comm::Communicator& group, Workers& workers);

/// Throws UserError naming the first matrix that decoding would fill.
void require_zeros(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
                   const std::vector<MatrixPair>& pairs);

/// Tensors of fewer than two dimensions that differ (floating point: as `vectors`, float16 or
/// float32; a tensor that float16 cannot hold stays float32), integers that differ, and tensors
/// that the base does not have, as they are, but those in `tied`. By name.
std::vector<WholeTensor> whole_tensors(const io::Checkpoint& base, const io::Checkpoint& fine_tuned,
                                       const std::vector<TiedTensor>& tied, at::ScalarType vectors);

}  // namespace espalier::compress
