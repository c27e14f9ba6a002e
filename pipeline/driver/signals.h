#pragma once
/// Signals of a run: SIGTERM and SIGUSR1 (Slurm's notice before the time limit) ask it to save and
/// stop; a file-size limit and a broken pipe become errors of the write that met them.

namespace espalier::driver {

void install_signal_handlers();

}  // namespace espalier::driver
