#pragma once
/// What the environment says about how this process was started.

#include <string>

namespace espalier::comm {

struct Launcher {
  bool present = false;      ///< mpirun, or srun with a PMI plugin, started this process
  bool initialized = false;  ///< MPI is initialised already (by a library or a test)
  int processes = 0;         ///< processes it says it started; 0 when it does not say
  std::string variable;      ///< where that number was found
};

Launcher find_launcher();

/// Throws EnvironmentError when the launcher started more processes than the group has: each would
/// take itself for the whole job and all would write the same files.
void require_group_size(const Launcher& launcher, int size);

}  // namespace espalier::comm
