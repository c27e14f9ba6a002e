#include "pipeline/model/stored_layers.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <filesystem>

#include "pipeline/io/atomic_file.h"
#include "pipeline/io/safetensors.h"

namespace espalier::model {
namespace {

constexpr int64_t kHeads = 3, kSize = 4, kIn = 10, kOut = kHeads * kSize;

/// One block whose q, k and v are stored together in three ways, and a plain layer.
Architecture architecture(const Stored& first) {
  Architecture a;
  a.heads = a.key_value_heads = kHeads;
  a.head_size = kSize;
  a.block_prefix = "model.h.";
  const auto part = [&](int64_t i) {
    Stored stored = first;
    stored.part = i;
    return stored;
  };
  a.linears = {{kQuery, kAttentionInput, "attn.qkv.q", kOut, kIn, true, part(0)},
               {kKey, kAttentionInput, "attn.qkv.k", kOut, kIn, true, part(1)},
               {kValue, kAttentionInput, "attn.qkv.v", kOut, kIn, true, part(2)},
               {kOutput, kAttentionOutput, "attn.o", kIn, kOut, false, {"", first.transposed}},
               {kUp, kFeedForwardInput, "mlp.up", 6, kIn, true}};
  return a;
}

const Stored kThirds{"attn.qkv", false, 3}, kByHead{"attn.qkv", false, 3, 0, true},
    kTransposed{"attn.qkv", true, 3};

struct Model {
  std::filesystem::path directory;
  NamedTensors tensors;
  io::Checkpoint checkpoint;

  static io::Checkpoint write(const std::filesystem::path& directory, const NamedTensors& tensors) {
    std::filesystem::create_directories(directory);
    io::write_file(directory / "config.json", "{}");
    io::write_safetensors(directory / "model.safetensors", tensors);
    return io::Checkpoint::open(directory);
  }
  explicit Model(const Stored& stored)
      : directory(std::filesystem::path(testing::TempDir()) / "stored_layers"),
        tensors{{"model.h.1.attn.qkv.weight",
                 stored.transposed ? at::randn({kIn, 3 * kOut}) : at::randn({3 * kOut, kIn})},
                {"model.h.1.attn.qkv.bias", at::randn({3 * kOut})},
                {"model.h.1.attn.o.weight",
                 stored.transposed ? at::randn({kOut, kIn}) : at::randn({kIn, kOut})}},
        checkpoint(write(directory, tensors)) {}
};

/// The row of part `part`'s output `o` among all stored outputs, written from the layouts.
int64_t stored_row(const Stored& stored, int64_t part, int64_t o) {
  if (!stored.by_head) return part * kOut + o;
  return (o / kSize) * 3 * kSize + part * kSize + o % kSize;
}

class StoredLayers : public testing::TestWithParam<Stored> {};

TEST_P(StoredLayers, EveryPartHasTheRowsThatItsLayoutSays) {
  const Model model(GetParam());
  const Architecture a = architecture(GetParam());
  const at::Tensor &weight = model.tensors[0].second, &bias = model.tensors[1].second;
  for (int64_t part = 0; part < 3; ++part) {
    EXPECT_EQ(stored_weight_name(a, 1, a.linears[part]), "model.h.1.attn.qkv.weight");
    EXPECT_EQ(a.weight_name(1, a.linears[part]),
              "model.h.1.attn.qkv." + std::string(1, "qkv"[part]) + ".weight");
    const at::Tensor w = layer_part(a, a.linears[part], weight);
    const at::Tensor b = layer_part(a, a.linears[part], bias);
    ASSERT_EQ(w.sizes(), at::IntArrayRef({kOut, kIn}));
    for (int64_t o = 0; o < kOut; ++o) {
      const int64_t row = stored_row(GetParam(), part, o);
      const at::Tensor expected = GetParam().transposed ? weight.select(1, row) : weight[row];
      EXPECT_TRUE(at::equal(w[o], expected)) << part << ' ' << o;
      EXPECT_TRUE(at::equal(b[o], bias[row])) << part << ' ' << o;
    }
  }
}

TEST_P(StoredLayers, LayersTakenApartAndPutTogetherAreTheSameBits) {
  const Model model(GetParam());
  const Architecture a = architecture(GetParam());
  NamedTensors layers;
  for (const Linear& linear : a.linears) {
    if (linear.role == kUp) continue;
    const at::Tensor stored = model.checkpoint.view(stored_weight_name(a, 1, linear));
    layers.emplace_back(a.weight_name(1, linear), layer_part(a, linear, stored).clone());
    if (linear.bias)
      layers.emplace_back(a.bias_name(1, linear),
                          layer_part(a, linear, model.tensors[1].second).clone());
  }
  const NamedTensors stored = stored_tensors(a, model.checkpoint, layers);
  ASSERT_EQ(stored.size(), model.tensors.size());
  for (size_t i = 0; i < stored.size(); ++i) {
    EXPECT_EQ(stored[i].first, model.tensors[i].first);
    EXPECT_TRUE(at::equal(stored[i].second, model.tensors[i].second)) << stored[i].first;
    EXPECT_TRUE(stored[i].second.is_contiguous());
  }
}

TEST_P(StoredLayers, APartThatIsNotGivenKeepsTheBasesValues) {
  const Model model(GetParam());
  const Architecture a = architecture(GetParam());
  const NamedTensors stored =
      stored_tensors(a, model.checkpoint,
                     {{a.weight_name(1, a.linears[1]), at::zeros({kOut, kIn}, at::kBFloat16)}});
  ASSERT_EQ(stored.size(), 1u);
  EXPECT_EQ(stored[0].second.scalar_type(), at::kBFloat16);
  for (int64_t part = 0; part < 3; ++part) {
    const at::Tensor w = layer_part(a, a.linears[part], stored[0].second);
    const at::Tensor before =
        layer_part(a, a.linears[part], model.tensors[0].second).to(at::kBFloat16);
    EXPECT_TRUE(at::equal(w, part == 1 ? at::zeros_like(before) : before)) << part;
  }
}

TEST_P(StoredLayers, PlainLayersAndOtherNamesPass) {
  const Model model(GetParam());
  const Architecture a = architecture(GetParam());
  const NamedTensors given = {{"model.h.1.mlp.up.weight", at::randn({6, kIn})},
                              {"model.h.1.mlp.up.bias", at::randn({6})},
                              {"model.h.x.attn.qkv.q.weight", at::randn({2})},
                              {"classifier.weight", at::randn({2, 3})}};
  const NamedTensors stored = stored_tensors(a, model.checkpoint, given);
  ASSERT_EQ(stored.size(), given.size());
  for (size_t i = 0; i < given.size(); ++i) {
    EXPECT_EQ(stored[i].first, given[i].first);
    EXPECT_EQ(stored[i].second.data_ptr(), given[i].second.data_ptr());
  }
}

INSTANTIATE_TEST_SUITE_P(Layouts, StoredLayers, testing::Values(kThirds, kByHead, kTransposed),
                         [](const auto& info) {
                           return info.param.by_head      ? "by_head"
                                  : info.param.transposed ? "transposed"
                                                          : "thirds";
                         });

}  // namespace
}  // namespace espalier::model
