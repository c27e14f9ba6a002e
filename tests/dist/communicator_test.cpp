#include "pipeline/comm/communicator.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <numeric>

#include "pipeline/comm/exact_sum.h"
#include "pipeline/errors.h"
#include "pipeline/random.h"

namespace espalier::comm {
namespace {

Communicator world() { return Communicator::world(120); }

std::vector<std::byte> pattern_of(int rank, int64_t size) {
  std::vector<std::byte> bytes(size);
  for (int64_t i = 0; i < size; ++i) bytes[i] = static_cast<std::byte>((rank + 1) * 37 + i * 11);
  return bytes;
}

// Longer than one piece, so that the cut is seen too.
constexpr int64_t kLong = 5'000'001;

TEST(World, ItsBackendIsMpiExactlyWhenALauncherStartedIt) {
  EXPECT_EQ(world().backend(), std::getenv("OMPI_COMM_WORLD_SIZE") ? "mpi" : "self");
  EXPECT_GE(world().rank(), 0);
  EXPECT_LT(world().rank(), world().size());
}

TEST(Collectives, SumsAreTheSumsOfAllRanks) {
  const auto group = world();
  const int64_t p = group.size();
  for (const int64_t size : {int64_t{0}, int64_t{1}, int64_t{1000}, int64_t{100'000}, kLong}) {
    std::vector<int64_t> values(size);
    for (int64_t i = 0; i < size; ++i)
      values[i] = (i + 1) * (group.rank() + 1) - (int64_t{1} << 61) / p;
    group.all_reduce_sum(values);
    int64_t wrong = 0;
    for (int64_t i = 0; i < size; ++i)
      wrong += values[i] != (i + 1) * p * (p + 1) / 2 - p * ((int64_t{1} << 61) / p);
    EXPECT_EQ(wrong, 0) << "of " << size;
  }
}

TEST(Collectives, MaximaAreTheLargestOfAllRanks) {
  const auto group = world();
  const int p = group.size(), rank = group.rank();
  std::vector<int64_t> integers = {rank, -rank, (rank == p / 2) ? INT64_MAX : INT64_MIN};
  group.all_reduce_max(std::span<int64_t>(integers));
  EXPECT_EQ(integers, (std::vector<int64_t>{p - 1, 0, INT64_MAX}));
  std::vector<double> doubles = {std::ldexp(1.0, rank), -1.5 - rank, rank == p - 1 ? INFINITY : 0};
  group.all_reduce_max(std::span<double>(doubles));
  EXPECT_EQ(doubles, (std::vector<double>{std::ldexp(1.0, p - 1), -1.5, INFINITY}));
}

TEST(Collectives, EveryRootBroadcastsItsBytes) {
  const auto group = world();
  for (int root = 0; root < group.size(); ++root)
    for (const int64_t size : {int64_t{0}, int64_t{1}, int64_t{300'000}, 8 * kLong}) {
      auto bytes = group.rank() == root ? pattern_of(root, size) : std::vector<std::byte>(size);
      group.broadcast(bytes, root);
      EXPECT_TRUE(bytes == pattern_of(root, size)) << size << " bytes of " << root;
    }
}

TEST(Collectives, ATextOfAnyLengthIsKnownToTheRootAlone) {
  const auto group = world();
  for (const auto& text : {std::string(), std::string("prune\0d", 7), std::string(1'000'000, 'x')})
    for (int root = 0; root < group.size(); ++root)
      EXPECT_EQ(group.broadcast(group.rank() == root ? text : "other", root), text);
}

TEST(Collectives, GathersKeepRankOrderAndLengths) {
  const auto group = world();
  for (const int64_t unit : {int64_t{0}, int64_t{3}, int64_t{200'000}, int64_t{40'000'000}}) {
    const auto size_of = [&](int rank) { return unit == 3 && rank == 1 ? 0 : unit + rank; };
    const auto mine = pattern_of(group.rank(), size_of(group.rank()));
    const auto all = group.all_gather(mine);
    ASSERT_EQ(static_cast<int>(all.size()), group.size());
    for (int rank = 0; rank < group.size(); ++rank)
      EXPECT_TRUE(all[rank] == pattern_of(rank, size_of(rank))) << unit << ", rank " << rank;
    const int root = group.size() - 1;
    const auto gathered = group.gather(mine, root);
    if (group.rank() == root)
      EXPECT_TRUE(gathered == all) << unit;
    else
      EXPECT_TRUE(gathered.empty());
  }
}

TEST(Collectives, BytesAreCountedAsTheHeaderSays) {
  const auto group = world();
  const int64_t p = group.size();
  const auto counted = [&](auto&& call) {
    const int64_t before = group.bytes_sent();
    call();
    return group.bytes_sent() - before;
  };
  std::vector<int64_t> values(600);
  std::vector<std::byte> bytes(1000);
  EXPECT_EQ(counted([&] { group.all_reduce_sum(values); }), 2 * 4800 * (p - 1) / p);
  EXPECT_EQ(counted([&] { group.broadcast(bytes); }), group.is_root() ? (p - 1) * 1000 : 0);
  EXPECT_EQ(counted([&] { group.all_gather(bytes); }), (p - 1) * 1000);
  EXPECT_EQ(counted([&] { group.gather(bytes); }), group.is_root() ? 0 : 1000);
  EXPECT_EQ(counted([&] { group.barrier(); }), 0);
}

TEST(RequireSame, PassesWhenEqualAndNamesTheFirstRankThatDiffers) {
  const auto group = world();
  EXPECT_NO_THROW(group.require_same("configuration", "a: 1\nb: 2"));
  if (group.size() == 1) return;
  for (int odd = 1; odd < group.size(); ++odd) {
    const bool differs = group.rank() >= odd;
    try {
      group.require_same("configuration", differs ? "a: 1\nb: 3\n" : "a: 1\nb: 2\n");
      FAIL() << "no error";
    } catch (const UserError& error) {
      const std::string message = error.what();
      EXPECT_NE(message.find("rank " + std::to_string(odd) + " has another configuration"),
                std::string::npos)
          << message;
      EXPECT_NE(message.find("line 2: 'b: 3' there, 'b: 2' on rank 0"), std::string::npos)
          << message;
    }
  }
}

/// Unit `unit` of a sum over units: the same on whichever rank it is computed.
std::vector<float> unit_values(int64_t unit, int64_t size) {
  const CounterRandom random(5, "exact", static_cast<uint64_t>(unit));
  std::vector<float> values(size);
  for (int64_t i = 0; i < size; ++i) values[i] = static_cast<float>(random.normal(i));
  return values;
}

TEST(ExactSums, HaveTheBitsOfAllUnitsSummedOnOneRank) {
  constexpr int64_t units = 23, size = 30'000;
  const auto group = world();
  ExactSum split({size / 3, size - size / 3}, units), whole = split;
  const std::vector<double> largest = {4.0, 5.0};
  split.set_grid(largest);
  whole.set_grid(largest);
  for (int64_t unit = 0; unit < units; ++unit) {
    const auto values = unit_values(unit, size);
    whole.add(values);
    if (unit % group.size() == group.rank()) split.add(values);
  }
  split.reduce(group);
  std::vector<double> expected(size), got(size);
  whole.result(expected);
  split.result(got);
  EXPECT_EQ(std::memcmp(got.data(), expected.data(), size * sizeof(double)), 0);
  EXPECT_EQ(split.unit_largest()[0], whole.unit_largest()[0]);
  EXPECT_EQ(split.unit_largest()[1], whole.unit_largest()[1]);
}

TEST(ExactSums, AGramHasTheBitsOfAllUnitsSummedOnOneRank) {
  constexpr int64_t units = 7, n = 210;
  const auto group = world();
  ExactGram split(n, units), whole(n, units);
  std::vector<float> diagonal(n);
  for (int64_t unit = 0; unit < units; ++unit) {
    const auto gram = unit_values(unit, n * n);
    if (unit == 0) {
      for (int64_t i = 0; i < n; ++i) diagonal[i] = 1.0f + std::fabs(gram[i * n + i]);
      split.set_grid(diagonal);
      whole.set_grid(diagonal);
    }
    whole.add(gram.data(), n);
    if (unit % group.size() == group.rank()) split.add(gram.data(), n);
  }
  split.reduce(group);
  std::vector<double> expected(n * n), got(n * n);
  whole.result(expected.data());
  split.result(got.data());
  EXPECT_EQ(std::memcmp(got.data(), expected.data(), n * n * sizeof(double)), 0);
}

TEST(ExactSums, AnOverflowOnOneRankIsSeenOnAll) {
  const auto group = world();
  ExactSum sum({10}, 4);
  ExactGram gram(2, 4);
  sum.set_grid(std::vector<double>{1.0});
  gram.set_grid(std::vector<float>{1.0f, 1.0f});
  if (group.rank() == group.size() - 1) {
    sum.add(std::vector<float>(10, 1e30f));
    gram.add(std::vector<float>{1.0f, 1e30f, 0.0f, 1.0f}.data(), 2);
  }
  sum.reduce(group);
  gram.reduce(group);
  EXPECT_TRUE(sum.overflowed());
  EXPECT_TRUE(gram.overflowed());
}

}  // namespace
}  // namespace espalier::comm
