#include "pipeline/model/sequence_tree.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <numeric>

#include "pipeline/errors.h"

namespace espalier::model {

int64_t SequenceTree::rows() const {
  return std::accumulate(branches.begin(), branches.end(), trunk);
}

int64_t SequenceTree::longest() const {
  return trunk + *std::max_element(branches.begin(), branches.end());
}

at::Tensor tree_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                          const at::Tensor& cosine, const at::Tensor& sine,
                          const std::vector<SequenceTree>& trees, const AttentionShape& shape) {
  if (!shape.causal) throw DefectError("tree_attention: the trunk would see its branches");
  std::vector<at::Tensor> parts;
  int64_t begin = 0;
  for (const SequenceTree& tree : trees) {
    int64_t branch = begin + tree.trunk;
    for (const int64_t rows : tree.branches) {
      const auto sequence = [&](const at::Tensor& x) {
        return at::cat({x.narrow(0, begin, tree.trunk), x.narrow(0, branch, rows)});
      };
      const auto of_length = [&](const at::Tensor& table) {
        return table.defined() ? table.narrow(0, 0, tree.trunk + rows) : table;
      };
      const at::Tensor y = attention(sequence(q), sequence(k), sequence(v), of_length(cosine),
                                     of_length(sine), 1, shape);
      const bool first = branch == begin + tree.trunk;
      parts.push_back(first ? y : y.narrow(0, tree.trunk, rows));
      branch += rows;
    }
    begin = branch;
  }
  return at::cat(parts);
}

at::Tensor tree_positions(const std::vector<SequenceTree>& trees) {
  std::vector<at::Tensor> parts;
  for (const SequenceTree& tree : trees) {
    parts.push_back(at::arange(tree.trunk, at::kLong));
    for (const int64_t rows : tree.branches)
      parts.push_back(at::arange(tree.trunk, tree.trunk + rows, at::kLong));
  }
  return at::cat(parts);
}

}  // namespace espalier::model
