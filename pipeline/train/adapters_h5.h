#pragma once
/// adapters.h5 as it lies on disk: named tensors and who made them. What they mean is the stages'
/// (stages/retrain/adapter_file.h).
///
/// Data sets of any depth, each with an attribute "type"; attributes of "/": method, settings (JSON
/// of the method's keys), base_checksum.

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <string>
#include <utility>
#include <vector>

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

}  // namespace espalier::train
