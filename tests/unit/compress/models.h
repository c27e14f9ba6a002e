#pragma once
/// Small matrices and checkpoints for the tests of compression.

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>
#include <utility>
#include <vector>

#include "pipeline/io/atomic_file.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/random.h"

namespace espalier::compress {

/// float64 [rows, columns], standard normal.
inline at::Tensor random_matrix(int64_t rows, int64_t columns, uint64_t seed) {
  at::Tensor x = at::empty({rows, columns}, at::kDouble);
  const CounterRandom random(seed, "test");
  for (int64_t i = 0; i < x.numel(); ++i) x.data_ptr<double>()[i] = random.normal(i);
  return x;
}

/// A sum of outer products whose weights fall as 0.8^k.
inline at::Tensor decaying_matrix(int64_t rows, int64_t columns, uint64_t seed, double fall = 0.8) {
  const int64_t k = std::min(rows, columns);
  const at::Tensor weights = at::pow(at::full({k}, fall, at::kDouble), at::arange(k, at::kDouble));
  return at::mm(random_matrix(rows, k, seed) * weights, random_matrix(k, columns, seed + 100));
}

using Tensors = std::vector<std::pair<std::string, at::Tensor>>;

inline void write_model(const std::filesystem::path& directory, const Tensors& tensors) {
  std::filesystem::create_directories(directory);
  io::write_safetensors(directory / "model.safetensors", tensors, {{"format", "pt"}});
  io::write_file(directory / "config.json", R"({"model_type": "llama", "dtype": "bfloat16"})");
}

/// Six matrices of several shapes (one pruned, one convolution, one that does not change) and
/// vectors.
inline Tensors base_tensors() {
  Tensors tensors;
  const std::vector<std::pair<int64_t, int64_t>> shapes = {
      {128, 96}, {96, 128}, {200, 64}, {64, 64}, {48, 160}};
  for (size_t i = 0; i < shapes.size(); ++i) {
    at::Tensor w = random_matrix(shapes[i].first, shapes[i].second, i) / 10;
    if (i == 1) w.masked_fill_(random_matrix(w.size(0), w.size(1), 50) > 0, 0);
    tensors.emplace_back("layers." + std::to_string(i) + ".weight", w.to(at::kBFloat16));
  }
  tensors.emplace_back("conv.weight",
                       random_matrix(32, 36, 20).reshape({32, 4, 3, 3}).to(at::kFloat));
  tensors.emplace_back("norm.weight", at::ones({96}, at::kBFloat16));
  tensors.emplace_back("bias", random_matrix(1, 64, 21).reshape({64}).to(at::kFloat));
  tensors.emplace_back("positions", at::arange(7, at::kLong));
  return tensors;
}

inline Tensors fine_tuned_tensors() {
  Tensors tensors = base_tensors();
  uint64_t seed = 300;
  for (auto& [name, tensor] : tensors) {
    if (tensor.dim() < 2 || name == "layers.3.weight") continue;
    const int64_t rows = tensor.size(0), columns = tensor.numel() / rows;
    ++seed;
    const at::Tensor change =
        decaying_matrix(rows, columns, seed, 0.6 + 0.05 * double(seed % 7)) * 0.02;
    const at::Tensor zero = tensor == 0;
    tensor = (tensor.to(at::kDouble) + change.reshape(tensor.sizes())).to(tensor.scalar_type());
    if (name == "layers.1.weight") tensor.masked_fill_(zero, 0);
  }
  tensors[6].second = tensors[6].second * 1.5;
  tensors.emplace_back("head.weight", random_matrix(3, 96, 30).to(at::kBFloat16));
  return tensors;
}

}  // namespace espalier::compress
