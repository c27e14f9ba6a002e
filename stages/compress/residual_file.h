#pragma once
/// residual.h5: everything that turns a base into its fine-tuned model, and nothing else.
///
/// attributes of /: kind "espalier.residual", version 1 (2 where something stands in it that
///   version 1 does not know: another method than ere, added rows, tied tensors; 3: labels),
///   base_checksum, checksum (of all datasets), bits, polar (0|1), dtype ("bfloat16"|"float32"|...:
///   of the decoded model); from version 2 on: method ("ere"|"low_rank"|"quantization").
/// /contents   uint8    JSON, in the order of the data below:
///   {"matrices": [{"name", "shape", "exponent", "mask", "rank"}], "whole": [{"name", "shape",
///   "dtype"}]}; from version 2 on: "added" as "whole": rows behind those of the tensor of that
///   name; "tied": [{"name", "to"}]; "labels": names of the classes, where they are others than the
///   base's; a matrix without singular vectors has "entries" instead of "rank".
/// /codes      uint8    for each matrix U's bit stream, then V's (see quantization.h); without
///   singular vectors one stream of the rows' entries, with a mask those where the base is not 0
/// /scales     float16  for each matrix r of U, then r of V (none for 16 bits); without singular
///   vectors one a row
/// /diagonals  float16  for each matrix r
/// /whole      uint8    tensors stored as they are, one after the other, then added rows
/// A few large data sets instead of groups per matrix: object headers would cost more than small
/// matrices do.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "pipeline/model/sequence_head.h"
#include "stages/compress/ere.h"

namespace espalier::compress {

struct ResidualMatrix {
  std::string name;
  std::vector<int64_t> shape;  ///< of the tensor; folded to out x rest
  EncodedMatrix encoded;
};

struct WholeTensor {
  std::string name;
  at::Tensor tensor;  ///< any shape and type
};

/// `name` is stored as the decoded tensor `to`.
struct TiedTensor {
  std::string name, to;
};

struct Residual {
  std::string method = "ere";
  std::string base_checksum;
  int64_t bits = 4;
  bool polar = true;
  at::ScalarType dtype = at::kBFloat16;  ///< floating-point tensors of the decoded model
  std::vector<ResidualMatrix> matrices;
  std::vector<WholeTensor> whole;
  std::vector<WholeTensor> added;  ///< rows behind those of the base's tensor of the name
  std::vector<TiedTensor> tied;
  model::ClassNames labels;  ///< of the decoded model's classes; absent: the base's
};

/// An upper bound of the file's bytes without codes, scales and diagonals: `other` are the tensors
/// stored whole and the added rows.
int64_t fixed_bytes(const std::vector<std::pair<std::string, std::vector<int64_t>>>& matrices,
                    const std::vector<WholeTensor>& other, const std::vector<TiedTensor>& tied,
                    const model::ClassNames& labels);

/// Atomic; the same residual gives the same bytes.
void write_residual(const std::filesystem::path& file, const Residual& residual);

/// Every length is checked against the file before memory is taken, every byte against the
/// checksum. Throws UserError naming the file and what is wrong.
Residual read_residual(const std::filesystem::path& file);

/// The name of a floating-point type as config.json writes it, and back (UserError).
std::string dtype_name(at::ScalarType dtype);
at::ScalarType dtype_of(const std::string& name, const std::string& origin);

}  // namespace espalier::compress
