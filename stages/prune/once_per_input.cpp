#include "stages/prune/once_per_input.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "pipeline/errors.h"

namespace espalier::prune {
namespace {

/// The rank that computes each input, and the order in which a rank does.
struct Shares {
  std::vector<int64_t> order;  ///< inputs, dearest first
  std::vector<int> owner;      ///< of each input
};

Shares share_out(std::span<const int64_t> sizes, int ranks) {
  Shares shares{{}, std::vector<int>(sizes.size(), -1)};
  for (size_t input = 0; input < sizes.size(); ++input)
    if (sizes[input] > 0) shares.order.push_back(static_cast<int64_t>(input));
  std::stable_sort(shares.order.begin(), shares.order.end(),
                   [&](int64_t a, int64_t b) { return sizes[a] > sizes[b]; });
  std::vector<double> load(static_cast<size_t>(ranks));
  for (const int64_t input : shares.order) {
    const auto least = std::min_element(load.begin(), load.end());
    shares.owner[input] = static_cast<int>(least - load.begin());
    *least += std::pow(static_cast<double>(sizes[input]), 3);
  }
  return shares;
}

void broadcast(Computed& computed, int root, const comm::Communicator& group) {
  nlohmann::json shapes = nlohmann::json::array();
  for (const at::Tensor& tensor : computed.tensors) shapes.push_back(tensor.sizes().vec());
  computed.report = nlohmann::json::parse(group.broadcast(computed.report.dump(), root));
  shapes = nlohmann::json::parse(group.broadcast(shapes.dump(), root));
  computed.tensors.resize(shapes.size());
  for (size_t i = 0; i < computed.tensors.size(); ++i) {
    at::Tensor& tensor = computed.tensors[i];
    if (!tensor.defined()) tensor = at::empty(shapes[i].get<std::vector<int64_t>>(), at::kFloat);
    if (tensor.scalar_type() != at::kFloat || !tensor.is_contiguous())
      throw DefectError("once_per_input: a result is not a contiguous float32 tensor");
    group.broadcast(
        comm::bytes_of(std::span(tensor.data_ptr<float>(), static_cast<size_t>(tensor.numel()))),
        root);
  }
}

}  // namespace

std::vector<Computed> once_per_input(std::span<const int64_t> sizes, Workers& workers,
                                     const comm::Communicator& group,
                                     const std::function<Computed(int64_t input)>& compute) {
  const Shares shares = share_out(sizes, group.size());
  std::vector<int64_t> mine;
  for (const int64_t input : shares.order)
    if (shares.owner[input] == group.rank()) mine.push_back(input);
  std::vector<Computed> all(sizes.size());
  workers.for_each(static_cast<int64_t>(mine.size()), [&](int64_t i, int) {
    c10::InferenceMode guard;
    all[mine[i]] = compute(mine[i]);
  });
  for (const int64_t input : shares.order) broadcast(all[input], shares.owner[input], group);
  return all;
}

}  // namespace espalier::prune
