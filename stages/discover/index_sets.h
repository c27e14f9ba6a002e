#pragma once
/// index_sets.h5, and the discovery that writes it.
///
/// attributes of /: kind "espalier.index_sets", version 1, method, cardinality, model_checksum
///   (io::Checkpoint::tensors_checksum of the model whose weights were looked at).
/// /WEIGHT   int64 [cardinality]   one a matrix, named as its weight: row * columns + column,
///   ascending; attributes: method, rank, objective, iterations (see IndexSet), rows, columns.

#include <filesystem>
#include <nlohmann/json.hpp>

#include "pipeline/comm/communicator.h"
#include "pipeline/driver/units.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/workers.h"
#include "stages/discover/method.h"
#include "stages/discover/targets.h"

namespace espalier::discover {

struct Request {
  std::string method_name;
  const Method& method;
  int64_t cardinality;
  uint64_t seed;
};

/// Writes `directory`/index_sets.h5 and returns on rank 0 {"cardinality", "matrices": [{name, rows,
/// columns, rank, objective, relative_residual, iterations}]}.
///
/// One whole matrix is a unit, on one thread; they are dealt over ranks and workers, longest
/// predicted first. Each result is kept in `directory`/state, so that a run that was killed or
/// asked to stop goes on behind it. Collective; the same bits on any number of ranks and workers.
nlohmann::json discover_index_sets(const io::Checkpoint& model,
                                   const model::Architecture& architecture,
                                   const std::vector<TargetMatrix>& targets, const Request& request,
                                   const std::filesystem::path& directory,
                                   const comm::Communicator& group, Workers& workers,
                                   const driver::Hooks& hooks);

}  // namespace espalier::discover
