/// logits_tool MODEL TOKENS.safetensors OUT.safetensors float32|bfloat16: what the model gives for
/// tokens [sequences, length] (and `visible` [sequences], when there): logits, or the last hidden
/// states of an encoder. The other side of test_model.py.

#include <ATen/ATen.h>

#include <cstdio>

#include "pipeline/errors.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/safetensors.h"
#include "pipeline/linalg/product.h"
#include "pipeline/model/block.h"

int main(int count, char** arguments) try {
  using namespace espalier;
  if (count != 5) return 2;
  linalg::one_library_thread();
  c10::InferenceMode guard;
  const auto dtype = std::string(arguments[4]) == "float32" ? at::kFloat : at::kBFloat16;
  const auto checkpoint = io::Checkpoint::open(arguments[1]);
  const auto architecture = model::read_architecture(checkpoint);
  const io::SafetensorsFile inputs(arguments[2]);
  const at::Tensor tokens = inputs.view("tokens").to(at::kLong);
  model::UnitShape unit{tokens.size(0), tokens.size(1), {}};
  if (inputs.tensors().contains("visible")) unit.visible = inputs.view("visible").to(at::kLong);
  const auto ends = model::load_ends(checkpoint, architecture, dtype);
  const auto rotary = model::rotary_table(architecture, unit.length);
  at::Tensor x = model::embed(architecture, ends, tokens.flatten(), unit);
  for (int64_t block = 0; block < architecture.blocks; ++block)
    x = model::block_forward(architecture,
                             model::load_block(checkpoint, architecture, block, dtype), x, unit,
                             rotary, model::plain_linear());
  if (ends.final_norm.weight.defined()) x = model::apply_norm(architecture, ends.final_norm, x);
  if (ends.head.defined()) x = linalg::product(x, ends.head.t(), at::kFloat);
  io::write_safetensors(
      arguments[3],
      {{"out", x.to(at::kFloat).view({unit.sequences, unit.length, -1}).contiguous()}});
  return 0;
} catch (const espalier::Error& error) {
  std::fprintf(stderr, "espalier: %s\n", error.what());
  return error.exit_code();
}
