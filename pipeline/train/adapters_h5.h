#pragma once
/// adapters.h5 as it lies on disk: named tensors and who made them. What they mean is the stages'
/// (stages/retrain/adapter_file.h).
///
/// Data sets of any depth, each with an attribute "type"; attributes of "/": method, settings (JSON
/// of the method's keys), base_checksum.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "pipeline/io/checkpoint.h"

namespace espalier::train {

struct AdapterIdentity {
  std::string method;
  std::string settings;       ///< the method's keys that give the parameters their meaning
  std::string base_checksum;  ///< of the model the adapter stands on
};

struct AdaptersFile {
  AdapterIdentity identity;
  std::vector<std::pair<std::string, at::Tensor>> tensors;  ///< "/a.weight/B", by path
};

/// Reads the file whole; it is hostile. Throws UserError naming file and data set.
AdaptersFile read_adapters_h5(const std::filesystem::path& file);
void write_adapters_h5(const std::filesystem::path& file, const AdaptersFile& content);

/// Where a path begins that is no parameter of a matrix: what the method needs beside them, a head.
inline constexpr std::string_view kFrozenGroup = "/frozen/", kHeadGroup = "/head/";

/// The matrices and other tensors that the parameters belong to: "/M/part" is of M.
std::set<std::string> matrices_of(const AdaptersFile& content);
/// The model less what stands beside these matrices: what an adapter of them stands on.
io::Checkpoint without_terms(const io::Checkpoint& model, const std::set<std::string>& matrices);
/// adapters.h5 of the stage that wrote what stands beside the model's matrices, of the nearest
/// where several did. Empty when nothing stands beside any, or that stage left none.
std::filesystem::path adapters_beside(const io::Checkpoint& model);

}  // namespace espalier::train
