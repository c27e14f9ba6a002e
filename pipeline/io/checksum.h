#pragma once
/// Checksums of files and byte ranges: XXH3-128 as 32 hexadecimal digits (libxxhash), and SHA-256
/// where Python has to compute the same with its standard library (libcrypto).

#include <cstddef>
#include <filesystem>
#include <span>
#include <string>

namespace espalier::io {

std::string checksum(std::span<const std::byte> bytes);
std::string checksum(const std::string& text);
/// Reads the file in pieces; throws UserError naming the file when it cannot be read.
std::string file_checksum(const std::filesystem::path& file);
/// SHA-256 of the file as 64 hexadecimal digits; throws as file_checksum does.
std::string file_sha256(const std::filesystem::path& file);
/// Of a directory's artifact: checksums of all regular files by sorted relative name.
std::string tree_checksum(const std::filesystem::path& directory);

}  // namespace espalier::io
