#pragma once
/// What stays beside a frozen matrix when an adapter is not merged into it.
///
/// A derived model directory stores the terms of matrix "M" in its safetensors files, always all
/// six, so that they hide those of a directory below:
///   M.added.down float32 [r, in], M.added.up float32 [out, r]     r = 0: no product
///   M.added.scale float64 [1]
///   M.added.positions int64 [c], M.added.values float32 [c]       c = 0: no sparse part
///   M.added.bias float32 [out] or [0]

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/io/checkpoint.h"

namespace espalier::model {

/// y = x W^T + scale (x down^T) up^T + x S^T + bias, S being zero but at `positions`. Every part
/// may be undefined (down and up together, positions and values together).
struct AddedTerms {
  at::Tensor down{};       ///< float32 [r, in]
  at::Tensor up{};         ///< float32 [out, r]
  double scale = 1;        ///< of the product alone, not of S
  at::Tensor positions{};  ///< int64 [c], row * in + column; those that repeat add up
  at::Tensor values{};     ///< float32 [c]
  at::Tensor bias{};       ///< float32 [out], added to what the layer has

  bool low_rank() const { return down.defined() && down.size(0) > 0; }
  bool sparse() const { return positions.defined() && positions.numel() > 0; }
  bool empty() const { return !low_rank() && !sparse() && !bias.defined(); }
};

/// Both at one matrix: ranks side by side, sparse parts and biases added.
AddedTerms sum_of_terms(const AddedTerms& a, const AddedTerms& b);

/// The tensors of `terms` at the matrix `matrix` [out, in], as they are stored.
std::vector<std::pair<std::string, at::Tensor>> stored_terms(const std::string& matrix,
                                                             const AddedTerms& terms, int64_t out,
                                                             int64_t in);
/// Nothing when there are none. Throws UserError naming directory and tensor where a shape, type or
/// position does not fit.
std::optional<AddedTerms> load_terms(const io::Checkpoint& checkpoint, const std::string& matrix,
                                     int64_t out, int64_t in);

/// The same with the matrix's sizes as the terms state them: [up's rows, down's columns].
std::optional<AddedTerms> load_terms(const io::Checkpoint& checkpoint, const std::string& matrix);

/// True for the names above.
bool is_term(const std::string& tensor_name);
/// The matrices that have terms which are not empty, sorted.
std::vector<std::string> matrices_with_terms(const io::Checkpoint& checkpoint);

/// For the products of `dtype`: down and up in it, the scale inside up.
AddedTerms prepared_terms(const AddedTerms& terms, at::ScalarType dtype);
/// y + the terms of x [tokens, in]; `terms` are prepared. Differentiable in x and y. 2 tokens r
/// (in + out) FLOPs.
at::Tensor add_terms(const AddedTerms& terms, const at::Tensor& x, const at::Tensor& y);

}  // namespace espalier::model
