#pragma once
/// The entry points of the module that holds nccl.cpp. Both sides are of one build, so C++ objects
/// and exceptions cross the boundary.

#include <memory>

#include "pipeline/comm/backend.h"

extern "C" {
/// Collective over `host`; device: the GPU of this rank. Throws EnvironmentError.
espalier::comm::DeviceBackend* espalier_nccl_create(std::shared_ptr<espalier::comm::Backend> host,
                                                    int device);
/// NCCL's version code: 10000 major + 100 minor + patch.
int espalier_nccl_version();
}
