// Packed tensors against plain loops over their bytes.
#include "pipeline/io/packed_tensor.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "pipeline/io/packed_header.h"
#include "temporary_directory.h"

namespace espalier::io {
namespace {

using Shape = std::vector<int64_t>;

char* bytes_of(const at::Tensor& tensor) { return static_cast<char*>(tensor.data_ptr()); }

/// Any bits, at least one of them set, in the elements that `chosen` accepts; the others are +0.
template <typename Chosen>
at::Tensor random_bits(const Shape& shape, at::ScalarType dtype, uint64_t seed, Chosen chosen) {
  std::mt19937_64 random(seed);
  at::Tensor tensor = at::zeros(shape, at::TensorOptions().dtype(dtype));
  const auto size = static_cast<int64_t>(tensor.element_size());
  for (int64_t i = 0; i < tensor.numel(); ++i)
    if (chosen(i, random))
      for (int64_t byte = 0; byte < size; ++byte)
        bytes_of(tensor)[i * size + byte] = static_cast<char>(random() | 1);
  return tensor;
}

at::Tensor random_share(const Shape& shape, at::ScalarType dtype, double share, uint64_t seed) {
  return random_bits(shape, dtype, seed, [&](int64_t, auto& random) {
    return std::uniform_real_distribution<double>()(random) < share;
  });
}

/// Of every group of a row `keep` elements, sometimes one fewer.
at::Tensor random_pattern(const Shape& shape, at::ScalarType dtype, int64_t keep, int64_t group,
                          uint64_t seed) {
  std::vector<int64_t> order(static_cast<size_t>(group));
  int64_t kept = 0;
  return random_bits(shape, dtype, seed, [&](int64_t i, auto& random) {
    if (i % group == 0) {
      for (int64_t k = 0; k < group; ++k) order[static_cast<size_t>(k)] = k;
      std::shuffle(order.begin(), order.end(), random);
      kept = random() % 8 == 0 ? keep - 1 : keep;
    }
    return order[static_cast<size_t>(i % group)] < kept;
  });
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.sizes() == b.sizes() &&
         (a.nbytes() == 0 || std::memcmp(bytes_of(a), bytes_of(b), a.nbytes()) == 0);
}

bool is_value(const at::Tensor& tensor, int64_t i) {
  const auto size = static_cast<int64_t>(tensor.element_size());
  return std::any_of(bytes_of(tensor) + i * size, bytes_of(tensor) + (i + 1) * size,
                     [](char byte) { return byte != 0; });
}

int64_t values_of(const at::Tensor& tensor) {
  int64_t values = 0;
  for (int64_t i = 0; i < tensor.numel(); ++i) values += is_value(tensor, i);
  return values;
}

Packing bitmask_of(const at::Tensor& tensor) {
  return {{tensor.scalar_type(), tensor.sizes().vec(), 0, static_cast<int64_t>(tensor.nbytes())},
          values_of(tensor)};
}

/// Bit `i` as the layout counts them.
int bit(const at::Tensor& places, int64_t i) {
  return (places.const_data_ptr<uint8_t>()[i / 8] >> (i % 8)) & 1;
}

TEST(PackedTensor, ABitmaskIsTheElementsWithABitSetAndOneBitForEach) {
  const std::vector<Shape> shapes = {{1, 1}, {3, 5}, {1, 64}, {5, 13}, {2, 3, 43}, {64, 66}};
  uint64_t seed = 0;
  for (const auto dtype : {at::kByte, at::kBFloat16, at::kHalf, at::kFloat, at::kDouble}) {
    for (const Shape& shape : shapes) {
      for (const double share : {0.0, 0.02, 0.5, 1.0}) {
        const at::Tensor tensor = random_share(shape, dtype, share, ++seed);
        const Packing packing = bitmask_of(tensor);
        const PackedTensor packed = pack(tensor, packing);
        ASSERT_EQ(packed.values.numel(), values_of(tensor));
        ASSERT_EQ(packed.places.numel(), (tensor.numel() + 63) / 64 * 8);
        const auto size = static_cast<int64_t>(tensor.element_size());
        int64_t next = 0;
        for (int64_t i = 0; i < packed.places.numel() * 8; ++i) {
          const bool value = i < tensor.numel() && is_value(tensor, i);
          ASSERT_EQ(bit(packed.places, i), value) << i;
          if (value) {
            ASSERT_EQ(std::memcmp(bytes_of(packed.values) + size * next++,
                                  bytes_of(tensor) + size * i, static_cast<size_t>(size)),
                      0);
          }
        }
        EXPECT_TRUE(same_bits(unpack(packing, packed, "t"), tensor));
      }
    }
  }
}

TEST(PackedTensor, NegativeZerosAndNumbersThatAreNoneSurvive) {
  at::Tensor tensor = at::zeros({4, 8}, at::kBFloat16);
  tensor[0][3] = -0.0;
  tensor[2][1] = std::numeric_limits<float>::quiet_NaN();
  tensor[3][7] = -std::numeric_limits<float>::infinity();
  for (const auto format : {PackFormat::bitmask, PackFormat::nm}) {
    const auto packing = packing_for(tensor, format);
    ASSERT_TRUE(packing);
    EXPECT_TRUE(same_bits(unpack(*packing, pack(tensor, *packing), "t"), tensor));
  }
  EXPECT_EQ(packing_for(tensor, PackFormat::bitmask)->values, 3);
}

struct PatternCase {
  int64_t keep, group, width;  ///< width: bits of an index
};
constexpr PatternCase kPatterns[] = {{1, 2, 1}, {2, 4, 2}, {1, 4, 2},  {4, 8, 3},
                                     {2, 8, 3}, {3, 5, 3}, {5, 16, 4}, {9, 32, 5}};

TEST(PackedTensor, APatternIsFoundAndStoresItsGroupsValuesAndPlaces) {
  for (const auto dtype : {at::kBFloat16, at::kFloat}) {
    for (const auto& [keep, group, width] : kPatterns) {
      const at::Tensor tensor = random_pattern({37, 3 * group}, dtype, keep, group, 9);
      const auto packing = packing_for(tensor, PackFormat::nm);
      ASSERT_TRUE(packing) << keep << ":" << group;
      ASSERT_EQ(packing->name(), std::to_string(keep) + ":" + std::to_string(group));
      const PackedTensor packed = pack(tensor, *packing);
      ASSERT_EQ(packed.values.numel(), 37 * 3 * keep);
      ASSERT_EQ(packed.places.numel(), (37 * 3 * keep * width + 63) / 64 * 8);
      at::Tensor plain = at::zeros_like(tensor);
      const auto size = static_cast<int64_t>(tensor.element_size());
      for (int64_t value = 0; value < packed.values.numel(); ++value) {
        int64_t place = 0;
        for (int64_t b = 0; b < width; ++b)
          place |= int64_t{bit(packed.places, value * width + b)} << b;
        std::memcpy(bytes_of(plain) + (value / keep * group + place) * size,
                    bytes_of(packed.values) + value * size, static_cast<size_t>(size));
      }
      EXPECT_TRUE(same_bits(plain, tensor));
      EXPECT_TRUE(same_bits(unpack(*packing, packed, "t"), tensor));
    }
  }
}

TEST(PackedTensor, APatternDownTheColumnsIsThatOfTheTransposedMatrix) {
  const at::Tensor along = random_pattern({48, 36}, at::kBFloat16, 2, 4, 3);
  const at::Tensor down = along.t().contiguous();
  const auto packing = packing_for(down, PackFormat::nm),
             other = packing_for(along, PackFormat::nm);
  ASSERT_TRUE(packing && other);
  EXPECT_EQ(packing->axis, 0u);
  EXPECT_EQ(other->axis, 1u);
  const PackedTensor packed = pack(down, *packing), expected = pack(along, *other);
  EXPECT_TRUE(same_bits(packed.values, expected.values));
  EXPECT_TRUE(same_bits(packed.places, expected.places));
  EXPECT_TRUE(same_bits(unpack(*packing, packed, "t"), down));
}

TEST(PackedTensor, WhatHasNoPatternIsABitmaskAndWhatSavesNothingStays) {
  const at::Tensor half = random_share({64, 96}, at::kBFloat16, 0.5, 1);
  EXPECT_EQ(packing_for(half, PackFormat::nm)->name(), "bitmask");
  // 4:8 holds, and nearly all of its values would be zeros.
  const at::Tensor few = at::zeros({60, 64}, at::kBFloat16);
  few[0].slice(0, 0, 4).fill_(1);
  EXPECT_EQ(packing_for(few, PackFormat::nm)->name(), "bitmask");
  EXPECT_EQ(packing_for(at::zeros({8, 8}, at::kFloat), PackFormat::nm)->bytes(), 8);
  const at::Tensor full = random_share({64, 96}, at::kBFloat16, 1, 2);
  const at::Tensor vector = at::zeros({64}, at::kFloat);
  for (const auto format : {PackFormat::bitmask, PackFormat::nm}) {
    EXPECT_FALSE(packing_for(full, format));
    EXPECT_FALSE(packing_for(vector, format));
    EXPECT_FALSE(packing_for(at::zeros({0, 4}, at::kFloat), format));
  }
  EXPECT_FALSE(packing_for(half, PackFormat::dense));
}

TEST(PackedTensor, TheBoundIsThatOfTheValuesAndTheChoicesOfTheirPlaces) {
  at::Tensor two = at::zeros({4, 4}, at::kBFloat16);
  two[0][1] = 1;
  two[0][2] = 2;
  EXPECT_NEAR(packing_for(two, PackFormat::bitmask)->bound_bits(), 2 * 16 + std::log2(120), 1e-9);
  const at::Tensor pattern = at::tensor({0, 1, 0, 1}, at::kFloat).repeat({4, 4});
  const auto packing = packing_for(pattern, PackFormat::nm);
  ASSERT_EQ(packing->name(), "1:2");
  EXPECT_NEAR(packing->bound_bits(), 32 * 32 + 32 * std::log2(2), 1e-9);
}

TEST(PackedTensor, ATensorThatChangedSinceItWasLookedAtIsNotPacked) {
  const at::Tensor tensor = random_pattern({8, 16}, at::kFloat, 2, 4, 5);
  for (const auto format : {PackFormat::bitmask, PackFormat::nm}) {
    const auto packing = packing_for(tensor, format);
    expect_contains(message_of<DefectError>([&] { pack(at::ones({8, 16}), *packing); }), {"pack"});
  }
}

TEST(PackedTensor, AnyOfItsBytesAreReadWithoutTheRest) {
  const at::Tensor pattern = random_pattern({12, 20}, at::kFloat, 2, 4, 6);
  const at::Tensor tensors[] = {random_share({7, 31}, at::kBFloat16, 0.4, 7), pattern,
                                pattern.t().contiguous()};
  for (const at::Tensor& tensor : tensors) {
    const auto packing = packing_for(tensor, PackFormat::nm);
    const PackedTensor packed = pack(tensor, *packing);
    const std::string whole(bytes_of(tensor), tensor.nbytes());
    const auto bytes = static_cast<int64_t>(whole.size());
    for (int64_t begin = 0; begin <= bytes; begin += 7) {
      for (int64_t count : {0, 1, 5, 64, 100}) {
        count = std::min(count, bytes - begin);
        ASSERT_EQ(unpack_bytes(*packing, packed, begin, count, "t"),
                  whole.substr(static_cast<size_t>(begin), static_cast<size_t>(count)))
            << packing->name() << " " << begin << " " << count;
      }
    }
  }
}

// ----------------------------------------------------------------------------- hostile files
std::string refusal(const Packing& packing, const PackedTensor& packed) {
  return message_of<UserError>([&] { unpack(packing, packed, "f: tensor \"t\""); });
}

TEST(PackedTensor, BitsThatAreNotAsManyAsTheValuesAreRefused) {
  const at::Tensor tensor = random_share({3, 5}, at::kFloat, 0.5, 11);
  const Packing packing = bitmask_of(tensor);
  PackedTensor packed = pack(tensor, packing);
  auto* bits = packed.places.data_ptr<uint8_t>();
  bits[0] ^= 1;
  for (const std::string& message : {refusal(packing, packed), message_of<UserError>([&] {
                                       unpack_bytes(packing, packed, 0, 4, "f: tensor \"t\"");
                                     })})
    expect_contains(message, {"f: tensor \"t\"", "bits are set for",
                              std::to_string(packing.values) + " values"});
  bits[0] ^= 1;
  bits[1] |= 0x80;  // behind the fifteenth
  expect_contains(refusal(packing, packed), {"behind those of its 15 elements"});
}

TEST(PackedTensor, IndicesThatDoNotIncreaseBelowTheGroupAreRefused) {
  // 2:5: three bits an index; the first group's are bits 0 to 5.
  const at::Tensor tensor = random_pattern({2, 10}, at::kFloat, 2, 5, 12);
  auto packing = bitmask_of(tensor);
  packing.keep = 2;
  packing.group = 5;
  packing.values = 8;
  const PackedTensor good = pack(tensor, packing);
  EXPECT_TRUE(same_bits(unpack(packing, good, "t"), tensor));
  const std::vector<std::pair<int, int>> cases = {{2, 2}, {3, 1}, {0, 5}, {1, 7}, {6, 7}};
  for (const auto& [first, second] : cases) {
    PackedTensor packed{good.values, good.places.clone()};
    auto* indices = packed.places.data_ptr<uint8_t>();
    indices[0] = static_cast<uint8_t>((indices[0] & 0xC0) | first | (second << 3));
    expect_contains(refusal(packing, packed),
                    {"f: tensor \"t\"", "of group 0", "increase from 0 to 4"});
  }
}

TEST(PackedHeader, WhatItSaysIsReadBack) {
  const TemporaryDirectory directory;
  std::map<std::string, Packing> packings;
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  const at::Tensor pattern = random_pattern({8, 16}, at::kBFloat16, 2, 4, 13);
  const std::pair<std::string, at::Tensor> all[] = {
      {"a", random_share({3, 5, 7}, at::kFloat, 0.5, 14)},
      {"b", pattern},
      {"c", pattern.t().contiguous()}};
  for (const auto& [name, tensor] : all) {
    const Packing packing = *packing_for(tensor, PackFormat::nm);
    const PackedTensor packed = pack(tensor, packing);
    tensors.emplace_back(name + kValuesSuffix, packed.values);
    tensors.emplace_back(name + packing.places_suffix(), packed.places);
    packings.emplace(name, packing);
  }
  write_safetensors(directory / "f.safetensors", tensors,
                    {{kPackedKey, packed_metadata(packings)}});
  const SafetensorsFile file(directory / "f.safetensors");
  const auto found = packed_tensors(file);
  ASSERT_EQ(found.size(), 3u);
  for (const auto& [name, tensor] : all) {
    const Packing& packing = found.at(name);
    EXPECT_EQ(packing.dense.bytes(), int64_t(tensor.nbytes()));
    const PackedTensor packed{file.view(name + kValuesSuffix),
                              file.view(name + packing.places_suffix())};
    EXPECT_TRUE(same_bits(unpack(packing, packed, "t"), tensor)) << name;
  }
}

struct HostileHeader {
  const char* text;
  std::vector<std::string> said;
};

TEST(PackedHeader, WhatDisagreesWithTheFileIsRefused) {
  const std::vector<HostileHeader> cases = {
      {"{", {"espalier.packed"}},
      {"[]", {"espalier.packed", "not a JSON object"}},
      {R"({"a":3})", {"\"a\"", "not an object"}},
      {R"({"a":{"packing":"bitmask"}})", {"\"a\"", "shape"}},
      {R"({"a":{"packing":"bitmask","shape":[]}})", {"\"a\"", "shape"}},
      {R"({"a":{"packing":"bitmask","shape":[0,4]}})", {"\"a\"", "shape"}},
      {R"({"a":{"packing":"bitmask","shape":[-4,4]}})", {"\"a\"", "shape"}},
      {R"({"a":{"packing":"bitmask","shape":[4611686018427387904,8]}})", {"\"a\"", "2^63"}},
      {R"({"a":{"packing":"bitmask","shape":[1,2]}})", {"\"a\"", "3 values", "2 elements"}},
      {R"({"a":{"packing":"bitmask","shape":[9,9]}})", {"a.bits", "8 bytes", "needs 16"}},
      {R"({"a":{"packing":"bitmask","shape":[4611686018427387903]}})", {"a.bits", "8 bytes"}},
      {R"({"a":{"shape":[4,4]}})", {"\"a\"", "packing"}},
      {R"({"a":{"packing":"two","shape":[4,4]}})", {"\"a\"", "N:M"}},
      {R"({"n":{"packing":"4:4","axis":1,"shape":[4,4]}})", {"\"n\"", "N:M"}},
      {R"({"n":{"packing":"0:4","axis":1,"shape":[4,4]}})", {"\"n\"", "N:M"}},
      {R"({"n":{"packing":"2:64","axis":1,"shape":[4,4]}})", {"\"n\"", "N:M"}},
      {R"({"n":{"packing":"2:4 ","axis":1,"shape":[4,4]}})", {"\"n\"", "N:M"}},
      {R"({"n":{"packing":"2:4","shape":[4,4]}})", {"\"n\"", "axis"}},
      {R"({"n":{"packing":"2:4","axis":2,"shape":[4,4]}})", {"\"n\"", "axis"}},
      {R"({"n":{"packing":"2:4","axis":1,"shape":[2,2,4]}})", {"\"n\"", "[2, 2, 4]"}},
      {R"({"n":{"packing":"2:4","axis":1,"shape":[8,2]}})", {"\"n\"", "divides"}},
      {R"({"n":{"packing":"2:4","axis":1,"shape":[8,4]}})", {"\"n\"", "8 values", "16 values"}},
      {R"({"n":{"packing":"4:8","axis":0,"shape":[8,2]}})", {"\"n\""}},
      {R"({"a":{"packing":"1:4","axis":1,"shape":[3,4]}})", {"does not hold a.indices"}},
      {R"({"b":{"packing":"bitmask","shape":[4,4]}})", {"does not hold b.values"}},
      {R"({"w":{"packing":"bitmask","shape":[4,4]}})", {"w.values", "[2, 2]"}},
      {R"({"f":{"packing":"bitmask","shape":[4,4]}})", {"f.bits", "F32"}},
      {R"({"p":{"packing":"bitmask","shape":[4,4]}})", {"\"p\"", "twice"}},
  };
  const auto byte = [](int64_t count) { return at::zeros({count}, at::kByte); };
  for (const HostileHeader& hostile : cases) {
    const TemporaryDirectory directory;
    write_safetensors(directory / "f.safetensors",
                      {{"n.values", at::ones({8})},
                       {"w.values", at::ones({2, 2})},
                       {"f.values", at::ones({2})},
                       {"f.bits", at::ones({2})},
                       {"p", at::ones({4, 4})},
                       {"p.values", at::ones({2})},
                       {"a.values", at::ones({3}, at::kBFloat16)},
                       {"a.bits", byte(8)},
                       {"n.indices", byte(16)},
                       {"w.bits", byte(8)},
                       {"p.bits", byte(8)}},
                      {{kPackedKey, hostile.text}});
    const SafetensorsFile file(directory / "f.safetensors");
    const std::string message = message_of<UserError>([&] { packed_tensors(file); });
    expect_contains(message, {(directory / "f.safetensors").string()});
    for (const std::string& part : hostile.said) expect_contains(message, {part});
  }
}

}  // namespace
}  // namespace espalier::io
