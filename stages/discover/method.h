#pragma once
/// What every way of choosing an index set is: exactly c positions of one matrix, from the matrix
/// alone (the fixed support of DSEE's sparse part, arXiv 2111.00160).
///
/// A method is one file: it reads its own keys and registers itself under the name that
/// `discover.method` uses.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "pipeline/config/section.h"

namespace espalier::discover {

struct Matrix {
  std::string name;   ///< "model.layers.3.self_attn.q_proj.weight"
  at::Tensor weight;  ///< float32 [rows, columns], contiguous, finite
  uint64_t seed = 0;  ///< of the run; draws are keyed by it and the name
};

struct IndexSet {
  std::vector<int64_t> positions;  ///< row * columns + column, distinct, ascending
  int64_t rank = 0;                ///< of the low-rank part U V; 0 for methods without one
  /// 1/2 ||W - U V - S||^2, S = W - U V at the positions and 0 elsewhere.
  double objective = 0;
  int64_t iterations = 0;
};

class Method {
 public:
  virtual ~Method() = default;
  /// Throws UserError naming the matrix when it cannot serve a matrix of this shape.
  virtual void check(const std::string& matrix, int64_t rows, int64_t columns) const = 0;
  /// What discover() costs, up to a constant.
  virtual double predicted_cost(int64_t rows, int64_t columns) const = 0;
  /// Exactly `cardinality` positions, on one thread; the same bits on any worker. Throws
  /// NumericalError naming the matrix when fewer positions can be told from the rest.
  virtual IndexSet discover(const Matrix& matrix, int64_t cardinality) const = 0;
};

/// Reads the method's own keys of the `discover` section.
using MethodFactory = std::function<std::unique_ptr<Method>(const config::Section&)>;

/// const MethodRegistration registration{"grebsmo", read_grebsmo};
struct MethodRegistration {
  MethodRegistration(const std::string& name, MethodFactory factory);
};

/// Throws UserError placed at the key `method`, listing the names, when there is none of it.
std::unique_ptr<Method> make_method(const config::Section& section);

/// 1/2 of the squares of `weight` outside `positions`: the objective without a low-rank part.
double squares_outside(const at::Tensor& weight, const std::vector<int64_t>& positions);

}  // namespace espalier::discover
