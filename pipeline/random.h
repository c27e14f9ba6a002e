#pragma once
/// Counter-based random numbers (Philox 4x32-10; Salmon et al., SC 2011).
///
/// A draw is a pure function of (seed, purpose, stream, index): never of the rank, the thread, or
/// how many numbers were drawn before. `purpose` says what the numbers are for ("calibration",
/// "spp.alpha"), `stream` the unit or the tensor (see stream_of(name)), `index` the element.

#include <array>
#include <cstdint>
#include <string_view>

namespace espalier {

/// FNV-1a of a name, so that a tensor's numbers depend on its name alone.
constexpr uint64_t stream_of(std::string_view name) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (unsigned char c : name) hash = (hash ^ c) * 0x100000001b3ull;
  return hash;
}

class CounterRandom {
 public:
  CounterRandom(uint64_t seed, std::string_view purpose, uint64_t stream = 0)
      : key_(seed * 0x9E3779B97F4A7C15ull ^ stream_of(purpose)), stream_(stream) {}

  uint64_t bits(uint64_t index) const {
    const auto block = philox(index >> 1);
    return index & 1 ? uint64_t{block[3]} << 32 | block[2] : uint64_t{block[1]} << 32 | block[0];
  }
  /// Uniform in [0, 1), 53 bits.
  double uniform(uint64_t index) const { return double(bits(index) >> 11) * 0x1p-53; }
  /// Uniform in [low, high).
  double uniform(uint64_t index, double low, double high) const {
    return low + (high - low) * uniform(index);
  }
  /// Uniform integer in [0, bound) by the multiply-high method; the bias is below bound / 2^64.
  uint64_t below(uint64_t index, uint64_t bound) const {
    return static_cast<uint64_t>((static_cast<unsigned __int128>(bits(index)) * bound) >> 64);
  }
  /// Standard normal (Box-Muller on draws 2*index and 2*index+1).
  double normal(uint64_t index) const;

 private:
  std::array<uint32_t, 4> philox(uint64_t counter) const {
    std::array<uint32_t, 4> c{uint32_t(counter), uint32_t(counter >> 32), uint32_t(stream_),
                              uint32_t(stream_ >> 32)};
    uint32_t k0 = uint32_t(key_), k1 = uint32_t(key_ >> 32);
    for (int round = 0; round < 10; ++round) {
      const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
      c = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1,
           uint32_t(p0)};
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    return c;
  }

  uint64_t key_, stream_;
};

}  // namespace espalier
