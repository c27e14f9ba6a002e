/// logits_tool MODEL TOKENS.safetensors OUT.safetensors float32|bfloat16: what the model gives for
/// tokens [sequences, length] (and `visible` [sequences], when there): logits, or the last hidden
/// states of an encoder. With `gradient` [sequences, length, hidden], the gradient at what the head
/// reads, also the gradient at what the first block reads. The other side of test_model.py.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>

#include <cstdio>

#include "pipeline/errors.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/model/block.h"
#include "pipeline/model/stored_layers.h"

int main(int count, char** arguments) try {
  using namespace espalier;
  if (count != 5) return 2;
  linalg::one_library_thread();
  const auto dtype = std::string(arguments[4]) == "float32" ? at::kFloat : at::kBFloat16;
  const auto checkpoint = io::Checkpoint::open(arguments[1]);
  const auto architecture = model::read_architecture(checkpoint);
  const io::SafetensorsFile inputs(arguments[2]);
  const at::Tensor tokens = inputs.view("tokens").to(at::kLong);
  model::UnitShape unit{tokens.size(0), tokens.size(1), {}};
  if (inputs.tensors().contains("visible")) unit.visible = inputs.view("visible").to(at::kLong);
  const auto ends = model::load_ends(checkpoint, architecture, dtype);
  const auto rotary = model::rotary_table(architecture, unit.length);
  const bool backward = inputs.tensors().contains("gradient");
  const at::Tensor first = model::embed(architecture, ends, tokens.flatten(), unit);
  const at::AutoGradMode grad_mode(backward);
  if (backward) first.set_requires_grad(true);
  at::Tensor x = first;
  for (int64_t block = 0; block < architecture.blocks; ++block)
    x = model::block_forward(architecture,
                             model::load_block(checkpoint, architecture, block, dtype), x, unit,
                             rotary, model::plain_linear());
  x = model::finish(architecture, ends, x);
  const auto by_sequence = [&](const at::Tensor& t) {
    return t.detach().to(at::kFloat).view({unit.sequences, unit.length, -1}).contiguous();
  };
  model::NamedTensors out;
  if (backward) {
    const at::Tensor gradient = inputs.view("gradient").to(dtype).flatten(0, 1);
    out.emplace_back("gradient", by_sequence(torch::autograd::grad({x}, {first}, {gradient})[0]));
  }
  if (ends.head.defined()) x = linalg::product(x.detach(), ends.head.t(), at::kFloat);
  if (ends.head_bias.defined()) x = x + ends.head_bias;
  out.emplace_back("out", by_sequence(x));
  io::write_safetensors(arguments[3], out);
  return 0;
} catch (const espalier::Error& error) {
  std::fprintf(stderr, "espalier: %s\n", error.what());
  return error.exit_code();
}
