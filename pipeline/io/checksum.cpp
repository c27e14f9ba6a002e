#include "pipeline/io/checksum.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <openssl/evp.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <vector>

#include "pipeline/errors.h"

namespace espalier::io {
namespace {

std::string hexadecimal(XXH128_hash_t hash) {
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

struct FreeState {
  void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
};

struct Descriptor {
  int value;
  ~Descriptor() {
    if (value >= 0) ::close(value);
  }
};

[[noreturn]] void fail_to_read(const std::filesystem::path& file) {
  throw UserError(fmt::format("{}: cannot be read: {}", file.string(), std::strerror(errno)));
}

/// Calls take(data, bytes) until the end of the file.
template <typename Take>
void read_pieces(const std::filesystem::path& file, Take take) {
  const Descriptor descriptor{::open(file.c_str(), O_RDONLY | O_CLOEXEC)};
  if (descriptor.value < 0) fail_to_read(file);
  std::vector<std::byte> piece(size_t{1} << 20);
  while (true) {
    const ssize_t count = ::read(descriptor.value, piece.data(), piece.size());
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) fail_to_read(file);
    if (count == 0) return;
    take(piece.data(), static_cast<size_t>(count));
  }
}

}  // namespace

std::string checksum(std::span<const std::byte> bytes) {
  return hexadecimal(XXH3_128bits(bytes.data(), bytes.size()));
}

std::string checksum(const std::string& text) {
  return hexadecimal(XXH3_128bits(text.data(), text.size()));
}

std::string file_checksum(const std::filesystem::path& file) {
  const std::unique_ptr<XXH3_state_t, FreeState> state(XXH3_createState());
  XXH3_128bits_reset(state.get());
  read_pieces(file, [&](const std::byte* data, size_t bytes) {
    XXH3_128bits_update(state.get(), data, bytes);
  });
  return hexadecimal(XXH3_128bits_digest(state.get()));
}

std::string file_sha256(const std::filesystem::path& file) {
  const std::unique_ptr<EVP_MD_CTX, decltype(&EVP_MD_CTX_free)> state(EVP_MD_CTX_new(),
                                                                      EVP_MD_CTX_free);
  if (!state || EVP_DigestInit_ex(state.get(), EVP_sha256(), nullptr) != 1)
    throw EnvironmentError("libcrypto offers no SHA-256 here; install another build of OpenSSL");
  read_pieces(file, [&](const std::byte* data, size_t bytes) {
    EVP_DigestUpdate(state.get(), data, bytes);
  });
  unsigned char digest[EVP_MAX_MD_SIZE];
  unsigned int length = 0;
  EVP_DigestFinal_ex(state.get(), digest, &length);
  std::string text;
  for (unsigned int i = 0; i < length; ++i) text += fmt::format("{:02x}", digest[i]);
  return text;
}

std::string tree_checksum(const std::filesystem::path& directory) {
  std::error_code error;
  std::vector<std::string> names;
  std::filesystem::recursive_directory_iterator entry(directory, error), end;
  for (; !error && entry != end; entry.increment(error)) {
    if (entry->is_regular_file()) names.push_back(entry->path().lexically_relative(directory));
  }
  if (error) {
    throw UserError(
        fmt::format("{}: the directory cannot be read: {}", directory.string(), error.message()));
  }
  std::sort(names.begin(), names.end());
  std::string listing;
  for (const std::string& name : names) {
    listing += fmt::format("{} {}:{}\n", file_checksum(directory / name), name.size(), name);
  }
  return checksum(listing);
}

}  // namespace espalier::io
