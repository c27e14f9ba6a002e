#include "pipeline/comm/launcher.h"

#include <fmt/format.h>
#include <mpi.h>

#include <cstdlib>

#include "pipeline/errors.h"

namespace espalier::comm {

Launcher find_launcher() {
  Launcher launcher;
  // Open MPI; PMIx; MPICH, Intel MPI and Slurm's PMI plugins. Settings such as OMPI_MCA_* are no
  // sign.
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMIX_NAMESPACE", "PMI_RANK",
                           "PMI_SIZE", "PMI_FD", "MPI_LOCALRANKID"})
    launcher.present |= std::getenv(name) != nullptr;
  // SLURM_STEP_NUM_TASKS stands in the environment of an srun, and of everything under it.
  const char* names[] = {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"};
  for (const char* name : names) {
    const char* value = std::getenv(name);
    if (!value || (!launcher.present && std::getenv("SLURM_PROCID") == nullptr)) continue;
    launcher.processes = std::atoi(value);
    launcher.variable = name;
    break;
  }
  int initialized = 0;
  MPI_Initialized(&initialized);
  launcher.initialized = initialized != 0;
  return launcher;
}

void require_group_size(const Launcher& launcher, int size) {
  if (launcher.processes <= size) return;
  throw EnvironmentError(fmt::format(
      "{} processes were started ({}) but MPI sees a group of {}: the launcher and the MPI library "
      "that espalier was built with do not work together; start with this library's own mpirun",
      launcher.processes, launcher.variable, size));
}

}  // namespace espalier::comm
