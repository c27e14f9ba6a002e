#pragma once
/// What DSEE (arXiv 2111.00160) judges weights and heads by, where a matrix W has added terms dW =
/// scale up down + S beside it (pipeline/model/added_terms.h).

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "pipeline/model/added_terms.h"
#include "pipeline/model/heads.h"

namespace espalier::prune {

enum class Criterion {
  delta,      ///< |dW|, the paper's
  merged,     ///< |W + dW|
  magnitude,  ///< |W|
  random      ///< uniform in [0, 1), a function of (seed, matrix, position)
};

using Terms = std::optional<model::AddedTerms>;

/// Whether the terms change the matrix, not its bias alone.
bool changes_matrix(const Terms& terms);

/// The criterion's quantity of rows [first, first + rows) of `weight` float32 [out, in], named
/// `name`: float32 [rows, in], >= 0, computed in float32. Same rows, same bits: callers ask for
/// units of fixed shape. 2 rows r in FLOPs. Throws NumericalError naming the matrix where it is not
/// finite.
at::Tensor judged_rows(Criterion criterion, const std::string& name, const at::Tensor& weight,
                       const Terms& terms, uint64_t seed, int64_t first, int64_t rows);

/// A matrix and what stands beside it.
struct Judged {
  std::string name;
  at::Tensor weight;  ///< float32 [out, in]
  Terms terms;
};

/// Of every query head of a block the sum of the quantity over its rows of q and over those of v
/// that its key/value head has, in float64; `random`: one draw, by the head's number in
/// config.json. Throws UserError naming q when the criterion judges changes and neither has any.
std::vector<double> judged_heads(Criterion criterion, const Judged& q, const Judged& v,
                                 const model::BlockHeads& heads, int64_t head_size, uint64_t seed);

/// Places of the `count` lowest, ascending; ties fall to the lower place.
std::vector<int64_t> lowest(const std::vector<double>& scores, int64_t count);

}  // namespace espalier::prune
