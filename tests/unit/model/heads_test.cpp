#include "pipeline/model/heads.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <filesystem>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/model/block.h"
#include "pipeline/model/head_slice.h"
#include "pipeline/model/inference_flops.h"
#include "tests/unit/retrain/tiny_llama.h"

namespace espalier::model {
namespace {

namespace fs = std::filesystem;
using retrain::kBlocks, retrain::kHidden, retrain::kIntermediate, retrain::kVocabulary;

constexpr int64_t kHeads = 4, kShared = 2, kSize = kHidden / kHeads;

/// Uneven in block 0, one key/value head less in block 1, all of block 2.
const KeptHeads kKept = {{0, 2, 3}, {2, 3}, {0, 1, 2, 3}};

TEST(Heads, AKeyValueHeadStaysWhileOneOfItsQueryHeadsDoes) {
  const BlockHeads uneven = block_heads({0, 2, 3}, 4, 2);
  EXPECT_EQ(uneven.key_value, (std::vector<int64_t>{0, 1}));
  EXPECT_EQ(uneven.key_value_of, (std::vector<int64_t>{0, 1, 1}));
  EXPECT_FALSE(uneven.shared_evenly());
  const BlockHeads second = block_heads({2, 3}, 4, 2);
  EXPECT_EQ(second.key_value, (std::vector<int64_t>{1}));
  EXPECT_TRUE(second.shared_evenly());
  EXPECT_TRUE(block_heads({1, 2}, 4, 2).shared_evenly());
  EXPECT_FALSE(block_heads({0, 3, 4, 5}, 6, 2).shared_evenly());
  EXPECT_TRUE(block_heads({0, 1, 2}, 6, 2).shared_evenly());
}

fs::path fresh(const std::string& name) {
  const fs::path directory = fs::path(testing::TempDir()) / ("heads_" + name);
  fs::remove_all(directory);
  fs::create_directories(directory);
  return directory;
}

TEST(Heads, AFileThatNamesNoHeadsOfTheModelIsRefusedByItsName) {
  const fs::path directory = fresh("hostile");
  retrain::write_tiny_llama(directory);
  const std::string all = "[0,1,2,3]";
  for (const std::string& content :
       {std::string("[]"), std::string("{\"heads\": 3}"), "{\"heads\": [" + all + "," + all + "]}",
        "{\"heads\": [[]," + all + "," + all + "]}", "{\"heads\": [[0,4]," + all + "," + all + "]}",
        "{\"heads\": [[2,1]," + all + "," + all + "]}",
        "{\"heads\": [[1,1]," + all + "," + all + "]}",
        "{\"heads\": [[-1]," + all + "," + all + "]}",
        "{\"heads\": [[0.5]," + all + "," + all + "]}",
        "{\"heads\": [\"0\"," + all + "," + all + "]}", std::string(80, '[')}) {
    io::write_file(directory / "heads.json", content);
    try {
      read_kept_heads(io::Checkpoint::open(directory), kBlocks, kHeads);
      ADD_FAILURE() << content;
    } catch (const UserError& error) {
      EXPECT_NE(std::string(error.what()).find("heads.json"), std::string::npos) << error.what();
    }
  }
}

/// The columns (or rows) of these heads, put together one by one.
at::Tensor of_heads(const at::Tensor& tensor, int64_t dimension,
                    const std::vector<int64_t>& heads) {
  std::vector<at::Tensor> parts;
  for (const int64_t head : heads) parts.push_back(tensor.narrow(dimension, head * kSize, kSize));
  return at::cat(parts, dimension).contiguous();
}

at::Tensor zero_but(const at::Tensor& tensor, int64_t dimension,
                    const std::vector<int64_t>& heads) {
  at::Tensor out = at::zeros_like(tensor);
  for (const int64_t head : heads)
    out.narrow(dimension, head * kSize, kSize).copy_(tensor.narrow(dimension, head * kSize, kSize));
  return out;
}

/// A tiny llama, and two models on it: without heads, and with zeros in their place. Both have
/// terms beside q, v and the output projection.
struct Models {
  fs::path base = fresh("base"), smaller = fresh("smaller"), zeroed = fresh("zeroed");

  Models() {
    retrain::write_tiny_llama(base);
    const io::Checkpoint checkpoint = io::Checkpoint::open(base);
    NamedTensors small, zeros;
    for (int64_t block = 0; block < kBlocks; ++block) {
      std::vector<int64_t> shared;
      for (const int64_t head : kKept[block])
        if (shared.empty() || shared.back() != head / 2) shared.push_back(head / 2);
      const auto add = [&](const std::string& layer, int64_t dimension,
                           const std::vector<int64_t>& heads, bool terms) {
        const std::string name =
            "model.layers." + std::to_string(block) + ".self_attn." + layer + ".weight";
        const at::Tensor weight = checkpoint.view(name);
        small.emplace_back(name, of_heads(weight, dimension, heads));
        zeros.emplace_back(name, zero_but(weight, dimension, heads));
        if (!terms) return;
        AddedTerms added;
        added.down = 0.3 * at::randn({2, weight.size(1)});
        added.up = 0.3 * at::randn({weight.size(0), 2});
        added.scale = 1.5;
        AddedTerms of_small = added, of_zeros = added;
        at::Tensor& part = dimension == 0 ? of_small.up : of_small.down;
        at::Tensor& zero_part = dimension == 0 ? of_zeros.up : of_zeros.down;
        zero_part = zero_but(part, dimension, heads);
        part = of_heads(part, dimension, heads);
        const at::Tensor left = small.back().second;
        for (auto& tensor : stored_terms(name, of_small, left.size(0), left.size(1)))
          small.push_back(tensor);
        for (auto& tensor : stored_terms(name, of_zeros, weight.size(0), weight.size(1)))
          zeros.push_back(tensor);
      };
      add("q_proj", 0, kKept[block], true);
      add("k_proj", 0, shared, false);
      add("v_proj", 0, shared, true);
      add("o_proj", 1, kKept[block], true);
    }
    const auto write = [&](const fs::path& directory, NamedTensors& tensors) {
      std::stable_sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
        return a.second.element_size() > b.second.element_size();
      });
      io::write_safetensors(directory / "attention.safetensors", tensors);
      io::write_derived(directory, checkpoint);
    };
    write(smaller, small);
    write(zeroed, zeros);
    write_kept_heads(smaller, kKept);
  }

  using NamedTensors = std::vector<std::pair<std::string, at::Tensor>>;
};

TEST(Heads, AModelWithoutHeadsIsTheFullModelWithZerosInTheirPlaceAlsoInItsGradient) {
  at::manual_seed(4);
  const Models models;
  const auto passed = [](const fs::path& directory, const at::Tensor& x) {
    const io::Checkpoint checkpoint = io::Checkpoint::open(directory);
    const Architecture a = read_architecture(checkpoint);
    const RotaryTable rotary = rotary_table(a, 11);
    at::Tensor y = x;
    for (int64_t block = 0; block < kBlocks; ++block)
      y = block_forward(a, load_block(checkpoint, a, block, at::kFloat), y, {2, 11, {}}, rotary,
                        plain_linear());
    return y;
  };
  const at::Tensor x = at::randn({22, kHidden});
  {
    const at::NoGradGuard no_grad;
    EXPECT_LT((passed(models.smaller, x) - passed(models.zeroed, x)).abs().max().item<double>(),
              2e-5);
    EXPECT_GT((passed(models.base, x) - passed(models.zeroed, x)).abs().max().item<double>(), 0.1);
  }
  const at::Tensor weights = at::randn({22, kHidden});
  const auto gradient = [&](const fs::path& directory) {
    const at::Tensor input = x.clone().set_requires_grad(true);
    return torch::autograd::grad({(passed(directory, input) * weights).sum()}, {input})[0];
  };
  EXPECT_LT((gradient(models.smaller) - gradient(models.zeroed)).abs().max().item<double>(), 2e-4);
}

TEST(Heads, SmallerMatricesWithoutTheFileAreRefused) {
  at::manual_seed(4);
  const Models models;
  fs::remove(models.smaller / "heads.json");
  EXPECT_THROW(read_architecture(io::Checkpoint::open(models.smaller)), UserError);
}

at::Tensor dense(const AddedTerms& terms) {
  at::Tensor sum = terms.scale * at::matmul(terms.up, terms.down);
  sum.view({-1}).index_add_(0, terms.positions, terms.values);
  return sum;
}

TEST(Heads, TermsAreTakenAndPutBackAsTheDenseMatrixTheyStandFor) {
  at::manual_seed(6);
  Architecture a;
  a.heads = kHeads;
  a.key_value_heads = kShared;
  a.head_size = kSize;
  const BlockHeads all = block_heads({0, 1, 2, 3}, kHeads, kShared),
                   left = block_heads({0, 3}, kHeads, kShared);
  for (const Linear& linear : {Linear{kQuery, kAttentionInput, "q", kHidden, 20},
                               Linear{kOutput, kAttentionOutput, "o", 20, kHidden}}) {
    const AddedTerms terms{at::randn({3, linear.in}), at::randn({linear.out, 3}), 0.7,
                           at::arange(5, linear.out * linear.in, 37, at::kLong),
                           at::randn({(linear.out * linear.in - 5 + 36) / 37})};
    const HeadSlice slice = head_slice(a, linear, all, left);
    const int64_t dimension = linear.role == kQuery ? 0 : 1;
    const AddedTerms taken = take_terms(slice, terms);
    EXPECT_LT((dense(taken) - of_heads(dense(terms), dimension, {0, 3})).abs().max().item<double>(),
              1e-5);
    EXPECT_LT((dense(put_terms(slice, taken)) - zero_but(dense(terms), dimension, {0, 3}))
                  .abs()
                  .max()
                  .item<double>(),
              1e-5);
  }
}

TensorCounts counts_of(const io::Checkpoint& checkpoint) {
  TensorCounts counts;
  for (const std::string& name : checkpoint.names()) {
    const at::Tensor tensor = checkpoint.view(name);
    counts[name] = {tensor.numel(), tensor.ne(0).sum().item<int64_t>()};
  }
  return counts;
}

TEST(InferenceFlops, AreTheProductsOfWhatIsThere) {
  at::manual_seed(4);
  const Models models;
  const auto flops = [](const fs::path& directory) {
    const io::Checkpoint checkpoint = io::Checkpoint::open(directory);
    return InferenceFlops(read_architecture(checkpoint), counts_of(checkpoint),
                          {kVocabulary * kHidden, 40})
        .of(10, 9);
  };
  // q and o of 32 x 32, k and v of 16 x 32, three of 48 x 32; 55 pairs of a token and one before
  // it.
  const double block = 2 * 10 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32) + 4 * 55 * 32;
  const double head = 2 * 9 * kVocabulary * kHidden;
  EXPECT_EQ(flops(models.base).dense, 3 * block + head);
  // Terms of rank 2 beside q, v and o.
  const double terms = 2 * 10 * 2 * ((32 + 32) + (16 + 32) + (32 + 32));
  EXPECT_EQ(flops(models.zeroed).dense, 3 * (block + terms) + head);
  // Block 0 lost a query head of 8; block 1 two, and a key/value head.
  const double one = 2 * 10 * (2 * 8 * 32 + 2 * 2 * 8) + 4 * 55 * 8;
  const double shared = 2 * 10 * (2 * 8 * 32 + 2 * 8);
  EXPECT_EQ(flops(models.smaller).dense, 3 * (block + terms) + head - 3 * one - shared);
  EXPECT_EQ(flops(models.smaller).nonzero, flops(models.zeroed).nonzero - 3 * 4 * 55 * 8);
}

TEST(InferenceFlops, AWindowAndAnEncoderSeeOtherPairs) {
  Architecture a;
  a.blocks = 2;
  a.heads = a.key_value_heads = 3;
  a.head_size = 5;
  EXPECT_EQ(InferenceFlops(a, {}, {}).of(4, 0).dense, 2 * 4 * 15 * (1 + 2 + 3 + 4));
  a.sliding_window = 2;
  EXPECT_EQ(InferenceFlops(a, {}, {}).of(4, 0).dense, 2 * 4 * 15 * (1 + 2 + 2 + 2));
  a.sliding_window.reset();
  a.task = Task::encoder;
  EXPECT_EQ(InferenceFlops(a, {}, {}).of(4, 0).dense, 2 * 4 * 15 * 16);
}

}  // namespace
}  // namespace espalier::model
