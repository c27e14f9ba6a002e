#pragma once
/// A tensor with zeros, packed: its values and their places, two tensors of a safetensors file. A
/// value is an element of which any bit is set, so negative zeros survive.
///
/// bitmask   NAME.values   [count] of the tensor's dtype, in row-major order
///           NAME.bits     uint8: bit i % 8, from the lowest, of byte i / 8 tells whether element i
///                         (row-major) is a value
/// N:M       NAME.values   [elements / M * N]: N of every M neighbours of a row, zeros included
///                         where there are fewer values
///           NAME.indices  uint8: their places among the M, increasing, each in ceil(log2 M) bits
///                         (two for 2:4), one behind the other, lowest bit first as above
/// Bits and indices end with zeros up to a multiple of 8 bytes: what follows them is aligned. With
/// axis 0 the groups run down the columns (layers stored [in, out]): all is as for the transposed
/// matrix. Which tensors of a file are packed, its header says (packed_header.h).

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>

#include "pipeline/io/safetensors.h"

namespace espalier::io {

/// How a model is written: every tensor as it is, or those that become smaller packed. With nm,
/// matrices that have no pattern are bitmasks.
enum class PackFormat { dense, bitmask, nm };

inline constexpr int64_t kLargestGroup = 32;
inline constexpr const char* kValuesSuffix = ".values";

/// How one tensor is packed.
struct Packing {
  TensorInfo dense;             ///< the tensor itself: dtype, shape, bytes [0, bytes())
  int64_t values = 0;           ///< so many are stored
  int64_t keep = 0, group = 0;  ///< N:M; 0:0 is a bitmask
  size_t axis = 1;              ///< N:M: the dimension along which the groups run

  bool bitmask() const { return group == 0; }
  std::string name() const;           ///< "bitmask", "2:4"
  const char* places_suffix() const;  ///< ".bits", ".indices"
  int64_t places_bytes() const;
  int64_t bytes() const;  ///< of values and places
  /// The fewest bits that tell the values and any places of their kind: count * bits of the dtype +
  /// log2 C(elements, count), or for every group N * bits + log2 C(M, N).
  double bound_bits() const;
};

struct PackedTensor {
  at::Tensor values;  ///< [Packing::values]
  at::Tensor places;  ///< uint8 [Packing::places_bytes()]
};

/// The packing of a tensor, or nothing when it takes no fewer bytes than the tensor or has fewer
/// than two dimensions. With nm, of all N:M, M <= 32, that a matrix has along its rows (else its
/// columns) the smallest. It has a pattern when no group has more than N values and half of the
/// groups have N: what fewer fill is chance, and smaller as a bitmask. One pass over the tensor,
/// and one over its bits for each pattern that holds.
std::optional<Packing> packing_for(const at::Tensor& tensor, PackFormat format);

/// Throws DefectError unless `packing` is one of this contiguous CPU tensor.
PackedTensor pack(const at::Tensor& tensor, const Packing& packing);

/// The tensor, in memory of its own. The parts have the sizes that the packing says; what they hold
/// is hostile: throws UserError starting with `where` when the bits set are not as many as the
/// values, or indices do not increase below M.
at::Tensor unpack(const Packing& packing, const PackedTensor& packed, const std::string& where);

/// Bytes [begin, begin + count) of unpack(): reads the bits, of indices a few. Throws as it does
/// where bits are wrong.
std::string unpack_bytes(const Packing& packing, const PackedTensor& packed, int64_t begin,
                         int64_t count, const std::string& where);

}  // namespace espalier::io
