#pragma once
/// What this process runs on: for environment.json, for messages, and for the manifest.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>

namespace espalier::driver {

/// Cores this rank may use: its affinity, shared with the other ranks of the host where mpirun
/// bound none.
int usable_cores();
/// VmHWM of this process, and its reset (Linux: clear_refs), so that each stage has its own peak.
int64_t peak_resident_bytes();
void reset_peak_resident();
/// {espalier, processor, host, products, libtorch, ...}: equal on all ranks but for the host.
nlohmann::json describe_machine();
/// The versions whose difference between ranks would change bits.
std::string library_versions();

}  // namespace espalier::driver
