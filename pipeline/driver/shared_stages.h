#pragma once
/// Stages that the members of a sweep share: one member computes, the others take its outputs over.
///
/// A stage's key says everything that its result depends on. So a finished stage of another member
/// with the same key, computed by the same libraries on the same processor model, is this member's
/// stage, done. Its outputs become files of the member's own directory (hard links; copies where
/// the file system has none), so that each member can be resumed, read, moved or removed by itself.

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/comm/communicator.h"
#include "pipeline/driver/progress.h"
#include "pipeline/io/manifest.h"

namespace espalier::driver {

/// A stage that a member has to do.
struct WantedStage {
  std::filesystem::path run_directory, start_model;
  std::string directory;  ///< "03-retrain"
  std::string key;
  /// Directories of the member's stages before this one, by key.
  const std::map<std::string, std::string>& earlier;
  bool resume = true;  ///< false: only what this command itself has finished is taken over
};

class SharedStages {
 public:
  /// The directory that holds the members': what lies there from earlier commands counts too.
  explicit SharedStages(std::filesystem::path sweep_directory);

  /// Fills the stage's directory from another member and gives the manifest that it is finished
  /// with: the other's facts, and in "taken_over" where it came from and what it cost there.
  /// Nothing, and the directory as it was, when no member has that stage intact. A stage that left
  /// files outside of its directory is never taken over. Collective: all ranks read the outputs
  /// once to compare checksums, rank 0 links; on other ranks the manifest is empty.
  ///
  /// Until the caller writes the manifest, the directory holds nothing that a start would go on
  /// from. Throws EnvironmentError when a copy cannot be written.
  std::optional<io::Manifest> take_over(const WantedStage& wanted, const comm::Communicator& group,
                                        Progress& progress);
  /// What a member has finished or kept, for those after it. On rank 0.
  void add(const std::string& key, const std::filesystem::path& stage_directory);

 private:
  void search();
  std::vector<std::filesystem::path> candidates(const WantedStage& wanted);

  std::filesystem::path directory_;
  bool searched_ = false;
  /// Stage directories by key: found when the command began, finished by it.
  std::map<std::string, std::vector<std::filesystem::path>> found_, finished_;
};

}  // namespace espalier::driver
