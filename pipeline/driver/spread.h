#pragma once
/// Work that one rank could do while the others wait, spread over all of them: checksums and copies
/// of everything that a large model consists of. Ranks meet after every item each, so no rank waits
/// longer for another than one item takes. What comes out does not depend on the ranks.
///
/// All of these are collective.

#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/manifest.h"

namespace espalier::driver {

/// compute(i) of every item, each by one rank, on every rank. Items of like size are computed at
/// the same time: `bytes` of each, the same on every rank.
std::vector<std::string> spread(const std::vector<int64_t>& bytes, const comm::Communicator& group,
                                const std::function<std::string(int64_t item)>& compute);

/// io::list_outputs of what rank 0 sees in the directory.
std::vector<io::Output> list_outputs(const std::filesystem::path& directory,
                                     const comm::Communicator& group);
/// Fills the checksums of rank 0's `outputs`, and gives them to every rank.
std::vector<io::Output> with_checksums(const std::filesystem::path& directory,
                                       const std::vector<io::Output>& outputs,
                                       const comm::Communicator& group);
/// io::damaged_output of rank 0's `outputs`.
std::string damaged_output(const std::filesystem::path& directory,
                           const std::vector<io::Output>& outputs, const comm::Communicator& group);

/// model.tensors_checksum(). Each rank reads its share of the tensors.
std::string tensors_checksum(const io::Checkpoint& model, const comm::Communicator& group);
/// io::write_derived by rank 0.
void write_derived(const std::filesystem::path& directory, const io::Checkpoint& base,
                   const comm::Communicator& group);

/// The export whole, each shard by one rank. `advance` hears, after every round, how many shards
/// are written. Returns the names of the files. Throws UserError when the ranks do not share the
/// directory.
std::vector<std::string> write_export(const io::ModelExport& model, const comm::Communicator& group,
                                      const std::function<void(int64_t done)>& advance);

}  // namespace espalier::driver
