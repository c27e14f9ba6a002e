#pragma once
/// What every pruning method is: it says which statistics of a matrix's input it needs, and prunes
/// the matrices of one block.
///
/// A method is one file: it reads its own keys, and registers itself under the name that
/// `prune.method` uses. How a block is calibrated, gathered and written is the stage's.

#include <array>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/config/section.h"
#include "pipeline/driver/stage.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/model/architecture.h"
#include "stages/prune/matrix_pruning.h"
#include "stages/prune/statistics.h"

namespace espalier::prune {

/// One block's matrices and what is known about them.
struct BlockWork {
  driver::StageContext& context;  ///< the run, its ranks and workers; other entries' files
  const model::Architecture& architecture;
  int64_t block = 0;
  std::vector<MatrixTask> tasks;  ///< weights whole on every rank; each with its own pattern
  std::array<InputStatistics, model::kInputs> statistics;  ///< by MatrixTask::statistic
  bool keep_zeros = true;
  bool keep_statistics = false;  ///< something after the method reads them
  /// What a reader may want to know of this block ({"damping": 0.01}): the same on every rank; kept
  /// in the journal and listed in the metrics.
  nlohmann::json report = nlohmann::json::object();

  Workers& workers() const { return *context.run.workers; }
  const comm::Communicator& group() const { return context.run.group; }
  /// The input's Gram to be changed at will: the statistic itself when nothing reads it afterwards.
  at::Tensor take_gram(int64_t input);
};

/// The whole model, for a method that looks at all of it before it prunes the first block.
struct ModelWork {
  driver::StageContext& context;
  const io::Checkpoint& checkpoint;
  std::vector<int64_t> sizes;  ///< matrices of each unit: the blocks in order, then the pooler
  /// A unit's, loaded anew; their masks are zeros.
  std::function<std::vector<MatrixTask>(int64_t unit)> tasks;
  Pattern pattern;
  bool keep_zeros = true;
  /// For what was found: written by rank 0, it outlives a stop and is removed with the state.
  std::filesystem::path journal;
};

/// One block's attention, for a method that removes whole heads.
struct HeadWork {
  const io::Checkpoint& checkpoint;
  const model::Architecture& architecture;
  int64_t block = 0;
  uint64_t seed = 0;
};

/// A method as configured.
class PruningMethod {
 public:
  virtual ~PruningMethod() = default;
  /// Statistics of every pruned matrix's input.
  virtual Needs needs() const { return {}; }
  /// Whether weights that stay get other values: these then travel between ranks.
  virtual bool moves_weights() const { return false; }
  /// Throws UserError placed at the key when the method cannot prune by `pattern`.
  virtual void check(const Pattern&) const {}
  /// Throws UserError when what the method reads stands neither in the model that the run starts
  /// from nor is left by an entry before (RunContext::earlier).
  virtual void check_start(const Pattern&, const driver::RunContext&, const io::Checkpoint&) const {
  }
  /// Whether the dense layer that pools an encoder's first token is pruned too, as a unit of its
  /// own behind the blocks (BlockWork::block is then their number).
  virtual bool prunes_pooler() const { return false; }
  /// Called before the first block, also when a run goes on. Collective.
  virtual void prepare(const ModelWork&) {}
  /// How many weights of a [rows, columns] matrix without zeros `pattern` removes; nothing where
  /// the data decides.
  virtual std::optional<int64_t> zeros(const Pattern& pattern, int64_t rows, int64_t columns) const;
  /// How many of `weights` go in all matrices together, at most one more than are lost, where
  /// thresholds of several matrices decide how many go in each; else nothing.
  virtual std::optional<int64_t> zeros_of_all(const Pattern&, int64_t /*weights*/) const {
    return std::nullopt;
  }
  /// Masks and prunes this rank's tiles of every task (see matrix_pruning.h). Collective.
  virtual void prune(BlockWork& work) = 0;
  /// pattern heads: of every query head that the block has; the lowest go. One unit, on one worker.
  /// Only methods that read prune.heads are asked.
  virtual std::vector<double> head_scores(const HeadWork& work) const;
  /// For the stage's metrics, behind prepare().
  virtual nlohmann::json facts() const { return nlohmann::json::object(); }
};

/// Reads the method's own keys of the `prune` section.
using MethodFactory = std::function<std::unique_ptr<PruningMethod>(const config::Section&)>;

/// const MethodRegistration registration{"wanda", read_wanda, {"variant"}};
/// `own_keys`: what the method reads and not every method does.
struct MethodRegistration {
  MethodRegistration(const std::string& name, MethodFactory factory,
                     std::vector<std::string> own_keys = {});
};
/// The registered names, sorted.
std::vector<std::string> method_names();
/// The method of `prune.method`. Throws UserError listing the names when there is none of that
/// name, and for a key that is set and that only other methods read.
std::unique_ptr<PruningMethod> make_method(const config::Section& section);

}  // namespace espalier::prune
