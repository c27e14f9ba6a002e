#pragma once
/// What is known of each matrix so far, one small file a matrix and a step, so that a killed run
/// goes on with any number of ranks, and results reach rank 0 by the same way. Files are written by
/// the worker that computed them and read by any rank: `directory` is shared by all ranks.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "stages/compress/ere.h"
#include "stages/compress/spectrum.h"

namespace espalier::compress {

/// An encoded matrix, what it decodes to, and its figures.
struct EncodedResult {
  EncodedMatrix encoded;
  at::Tensor decoded;  ///< the tensor's shape, the model's dtype (a view of the file when read)
  double energy_kept = 0;
  EncodingErrors errors;
};

class Journal {
 public:
  /// `purpose` says what was asked of which models: a journal of another purpose is removed first.
  /// `owner` (one rank) does so and creates the directory; others wait for it outside.
  Journal(std::filesystem::path directory, const std::string& purpose, bool owner);

  /// How many singular values of each matrix are wanted; decided once a round and kept, so that a
  /// run that goes on decides the rest from the same values as an undisturbed one.
  std::vector<int64_t> targets() const;
  void write_targets(const std::vector<int64_t>& targets) const;

  /// Values asked for when matrix i was decomposed last; -1 when it was not.
  int64_t decomposed_to(int64_t i) const;
  void write(int64_t i, const Decomposition& decomposition, int64_t count) const;
  /// With the vectors or without (they stay undefined).
  Decomposition decomposition(int64_t i, bool vectors) const;

  bool encoded(int64_t i) const;
  void write(int64_t i, const EncodedResult& result) const;
  EncodedResult result(int64_t i) const;

 private:
  std::filesystem::path file_of(const char* kind, int64_t i) const;
  std::filesystem::path directory_;
};

}  // namespace espalier::compress
