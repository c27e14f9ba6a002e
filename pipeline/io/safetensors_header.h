#pragma once
/// The header of a safetensors file, checked against the size of its file.

#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "pipeline/io/safetensors.h"

namespace espalier::io {

struct SafetensorsHeader {
  std::map<std::string, TensorInfo> tensors;
  std::map<std::string, std::string> metadata;
};

inline constexpr int64_t kMaxHeaderBytes = 100'000'000;

/// Parses the header of a file of `file_bytes` bytes. `start` is the file's content, of which the
/// length and the header are read. Throws UserError starting with `file`.
SafetensorsHeader parse_safetensors_header(const char* start, int64_t file_bytes,
                                           const std::string& file);

}  // namespace espalier::io
