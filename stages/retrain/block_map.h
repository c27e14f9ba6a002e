#pragma once
/// Block-diagonal maps H of a matrix's inputs or outputs, H = blkdiag(H_1 .. H_blocks), each block
/// [width / blocks, width / blocks]: reflections by unit vectors, or whole blocks.
///
/// A map tells only how it departs from the identity, so that a map at the identity changes no bit.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "pipeline/train/parameters.h"

namespace espalier::retrain {

class BlockMap {
 public:
  virtual ~BlockMap() = default;

  /// Named `name`, `name`2 ...
  virtual std::vector<train::Parameter> initial(const std::string& name, uint64_t seed) const = 0;
  /// How many tensors initial() gives.
  virtual int64_t parameter_count() const = 0;
  /// Once a step, from the values that initial() began with.
  virtual void prepare(at::TensorList values) = 0;

  /// x (H - I)^T, row by row (H - I) x; transposed: x (H - I). x [rows, width] of any float type;
  /// float32 [rows, width].
  virtual at::Tensor change(const at::Tensor& x, bool transposed) const = 0;
  /// |H - I|, the Frobenius norm over all blocks.
  virtual double distance() const = 0;
  /// The values' gradients, given dz and x [rows, width] of z = x H^T.
  virtual std::vector<at::Tensor> gradients(const at::Tensor& dz, const at::Tensor& x) const = 0;
};

/// H = I + sum_k coefficients[k] u_k u_k^T / |u_k|^2 in each block; u_k float32 [blocks, width /
/// blocks]. Never formed: 4 width FLOPs a row and vector. All u_k start at the same values.
struct ReflectionOptions {
  int64_t blocks = 1, width = 1;
  std::vector<double> coefficients;
  double start_bound = 1;  ///< u starts uniform in +-start_bound
  double start_norm = 0;   ///< when positive, every block of u is then scaled to this norm
};
std::unique_ptr<BlockMap> make_reflections(const ReflectionOptions& options);

/// Every block is a whole matrix with a parameter [blocks, d, d], d = width / blocks; 2 width d
/// FLOPs a row.
struct WholeBlocks {
  int64_t blocks = 1, width = 1;
  bool cayley = false;  ///< (I + S)(I - S)^-1 with S = (R - R^T) / 2, R = 0; else N itself, from I
};
std::unique_ptr<BlockMap> make_whole_blocks(const WholeBlocks& options);

}  // namespace espalier::retrain
