#include "pipeline/model/stored_layers.h"

#include <ATen/ATen.h>

#include <charconv>
#include <map>
#include <optional>

namespace espalier::model {
namespace {

/// A tensor's name taken apart: which layer of which block, and whether its weight or bias.
struct Place {
  int64_t block;
  const Linear* linear;
  bool bias;
};

std::optional<Place> place_of(const Architecture& a, const std::string& name) {
  if (!name.starts_with(a.block_prefix)) return {};
  const char* const first = name.data() + a.block_prefix.size();
  const char* const end = name.data() + name.size();
  int64_t block = 0;
  const auto [rest, error] = std::from_chars(first, end, block);
  if (error != std::errc() || rest == end || *rest != '.') return {};
  const std::string relative(rest + 1, end);
  for (const Linear& linear : a.linears) {
    if (relative == linear.name + ".weight") return Place{block, &linear, false};
    if (relative == linear.name + ".bias") return Place{block, &linear, true};
  }
  return {};
}

bool plain(const Stored& stored) { return stored.parts == 1 && !stored.transposed; }

/// The rows of the layer among those of all parts, both with outputs as rows: a view.
at::Tensor rows_of_part(const Architecture& a, const Linear& linear, const at::Tensor& outputs) {
  const Stored& s = linear.stored;
  if (!s.by_head) return outputs.narrow(0, s.part * linear.out, linear.out);
  std::vector<int64_t> by_head{linear.out / a.head_size, s.parts, a.head_size};
  if (outputs.dim() == 2) by_head.push_back(linear.in);
  return outputs.view(by_head).select(1, s.part);  // [heads, size, in] or [heads, size]
}

at::Tensor with_outputs_as_rows(const Linear& linear, const at::Tensor& stored) {
  return linear.stored.transposed && stored.dim() == 2 ? stored.t() : stored;
}

/// What the parts of one tensor are put into: the base's values, where they are of this size.
at::Tensor joined_start(const io::Checkpoint& base, const std::string& stored, const Linear& linear,
                        const at::Tensor& part) {
  const std::vector<int64_t> shape =
      part.dim() == 1 ? std::vector{linear.out * linear.stored.parts} : stored_weight_shape(linear);
  if (base.info(stored).shape != shape) return at::zeros(shape, part.options());
  const at::Tensor start =
      base.view(stored).to(part.scalar_type(), false, /*copy=*/true, at::MemoryFormat::Contiguous);
  base.drop(stored);
  return start;
}

std::string stored_name(const Linear& linear) {
  return linear.stored.tensor.empty() ? linear.name : linear.stored.tensor;
}

}  // namespace

std::string stored_weight_name(const Architecture& a, int64_t block, const Linear& linear) {
  return a.tensor_name(block, stored_name(linear) + ".weight");
}
std::string stored_bias_name(const Architecture& a, int64_t block, const Linear& linear) {
  return a.tensor_name(block, stored_name(linear) + ".bias");
}

std::vector<int64_t> stored_weight_shape(const Linear& linear) {
  const int64_t outputs = linear.out * linear.stored.parts;
  if (linear.stored.transposed) return {linear.in, outputs};
  return {outputs, linear.in};
}

at::Tensor layer_part(const Architecture& a, const Linear& linear, const at::Tensor& stored) {
  if (plain(linear.stored)) return stored;
  const at::Tensor outputs = with_outputs_as_rows(linear, stored);
  if (linear.stored.parts == 1) return outputs;
  const at::Tensor rows = rows_of_part(a, linear, outputs);
  return linear.stored.by_head ? rows.flatten(0, 1) : rows;
}

std::vector<std::string> copies_of_tied_head(const Architecture& a,
                                             const io::Checkpoint& checkpoint) {
  std::vector<std::string> copies;
  if (a.head != a.token_embedding) return copies;
  const io::TensorInfo& info = checkpoint.info(a.token_embedding);
  for (const std::string& name : checkpoint.names()) {
    const io::TensorInfo& other = checkpoint.info(name);
    if (name != a.token_embedding && other.dtype == info.dtype && other.shape == info.shape &&
        checkpoint.tensor_checksum(name) == checkpoint.tensor_checksum(a.token_embedding))
      copies.push_back(name);
  }
  return copies;
}

NamedTensors stored_tensors(const Architecture& a, const io::Checkpoint& base,
                            const NamedTensors& layers) {
  NamedTensors tensors;
  std::map<std::string, size_t> joined;  // where a tensor of several parts stands in `tensors`
  for (const auto& [name, tensor] : layers) {
    const auto place = place_of(a, name);
    if (!place || plain(place->linear->stored)) {
      tensors.emplace_back(name, tensor);
      if (name == a.token_embedding)
        for (const std::string& copy : copies_of_tied_head(a, base))
          tensors.emplace_back(copy, tensor);
      continue;
    }
    const Linear linear = a.in_block(place->block, *place->linear);
    const std::string stored = place->bias ? stored_bias_name(a, place->block, linear)
                                           : stored_weight_name(a, place->block, linear);
    if (linear.stored.parts == 1) {
      tensors.emplace_back(stored, with_outputs_as_rows(linear, tensor).contiguous());
      continue;
    }
    const auto [found, first] = joined.try_emplace(stored, tensors.size());
    if (first) tensors.emplace_back(stored, joined_start(base, stored, linear, tensor));
    at::Tensor rows =
        rows_of_part(a, linear, with_outputs_as_rows(linear, tensors[found->second].second));
    rows.copy_(tensor.reshape(rows.sizes()));
  }
  return tensors;
}

}  // namespace espalier::model
