#include "pipeline/model/added_terms.h"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <cmath>

#include "pipeline/errors.h"
#include "pipeline/linalg/product.h"

namespace espalier::model {
namespace {

constexpr const char* kMark = ".added.";

at::Tensor joined(const at::Tensor& a, const at::Tensor& b, int64_t dimension) {
  if (!a.defined()) return b;
  return b.defined() ? at::cat({a, b}, dimension) : a;
}

/// The product with its scale inside `up`: bases of different scales can then stand side by side.
at::Tensor scaled_up(const AddedTerms& terms) {
  return terms.up.defined() && terms.scale != 1 ? terms.up * terms.scale : terms.up;
}

/// A copy of the part, checked: -1 in `shape` is any size.
at::Tensor read_part(const io::Checkpoint& checkpoint, const std::string& matrix, const char* part,
                     at::ScalarType type, const std::vector<int64_t>& shape) {
  const std::string name = matrix + kMark + part;
  const std::string where = checkpoint.directory().string();
  if (!checkpoint.has(name))
    throw UserError(fmt::format("{}: tensor {} is missing beside the other added terms of {}",
                                where, name, matrix));
  const io::TensorInfo& info = checkpoint.info(name);
  bool fits = info.dtype == type && info.shape.size() == shape.size();
  for (size_t d = 0; fits && d < shape.size(); ++d)
    fits = shape[d] < 0 || info.shape[d] == shape[d];
  if (!fits)
    throw UserError(fmt::format("{}: tensor {} is {} [{}]; {} [{}] is expected (-1: any size)",
                                where, name, c10::toString(info.dtype), fmt::join(info.shape, ", "),
                                c10::toString(type), fmt::join(shape, ", ")));
  const at::Tensor copy = checkpoint.view(name).clone();
  checkpoint.drop(name);
  if (at::isFloatingType(type) && !at::isfinite(copy).all().item<bool>())
    throw UserError(fmt::format("{}: tensor {} holds values that are not finite", where, name));
  return copy;
}

}  // namespace

AddedTerms sum_of_terms(const AddedTerms& a, const AddedTerms& b) {
  AddedTerms sum;
  sum.down = joined(a.down, b.down, 0);
  sum.up = joined(scaled_up(a), scaled_up(b), 1);
  sum.positions = joined(a.positions, b.positions, 0);
  sum.values = joined(a.values, b.values, 0);
  sum.bias = a.bias.defined() && b.bias.defined() ? a.bias + b.bias
             : a.bias.defined()                   ? a.bias
                                                  : b.bias;
  return sum;
}

std::vector<std::pair<std::string, at::Tensor>> stored_terms(const std::string& matrix,
                                                             const AddedTerms& terms, int64_t out,
                                                             int64_t in) {
  const auto whole = [](const at::Tensor& t, at::IntArrayRef absent, at::ScalarType type) {
    return t.defined() ? t.detach().to(type).contiguous() : at::empty(absent, type);
  };
  const std::string stem = matrix + kMark;
  return {{stem + "scale", at::full({1}, terms.scale, at::kDouble)},
          {stem + "positions", whole(terms.positions, {0}, at::kLong)},
          {stem + "down", whole(terms.down, {0, in}, at::kFloat)},
          {stem + "up", whole(terms.up, {out, 0}, at::kFloat)},
          {stem + "values", whole(terms.values, {0}, at::kFloat)},
          {stem + "bias", whole(terms.bias, {0}, at::kFloat)}};
}

std::optional<AddedTerms> load_terms(const io::Checkpoint& checkpoint, const std::string& matrix,
                                     int64_t out, int64_t in) {
  if (!checkpoint.has(matrix + kMark + "down")) return std::nullopt;
  AddedTerms terms;
  terms.down = read_part(checkpoint, matrix, "down", at::kFloat, {-1, in});
  terms.up = read_part(checkpoint, matrix, "up", at::kFloat, {out, terms.down.size(0)});
  terms.scale = read_part(checkpoint, matrix, "scale", at::kDouble, {1}).item<double>();
  terms.positions = read_part(checkpoint, matrix, "positions", at::kLong, {-1});
  terms.values = read_part(checkpoint, matrix, "values", at::kFloat, {terms.positions.numel()});
  terms.bias = read_part(checkpoint, matrix, "bias", at::kFloat, {-1});
  if (terms.bias.numel() == 0) terms.bias.reset();
  if (terms.bias.defined() && terms.bias.numel() != out)
    throw UserError(fmt::format("{}: tensor {}{}bias has {} elements, the matrix {} rows",
                                checkpoint.directory().string(), matrix, kMark, terms.bias.numel(),
                                out));
  if (terms.sparse() && (terms.positions.min().item<int64_t>() < 0 ||
                         terms.positions.max().item<int64_t>() >= out * in))
    throw UserError(fmt::format("{}: tensor {}{}positions leaves the matrix [{}, {}]",
                                checkpoint.directory().string(), matrix, kMark, out, in));
  if (terms.empty()) return std::nullopt;
  return terms;
}

std::optional<AddedTerms> load_terms(const io::Checkpoint& checkpoint, const std::string& matrix) {
  const std::string down = matrix + kMark + "down", up = matrix + kMark + "up";
  if (!checkpoint.has(down)) return std::nullopt;
  const bool whole = checkpoint.has(up) && checkpoint.info(up).shape.size() == 2 &&
                     checkpoint.info(down).shape.size() == 2;
  if (!whole)
    throw UserError(fmt::format("{}: tensors {} and {} are not two matrices",
                                checkpoint.directory().string(), down, up));
  return load_terms(checkpoint, matrix, checkpoint.info(up).shape[0],
                    checkpoint.info(down).shape[1]);
}

bool is_term(const std::string& tensor_name) {
  const size_t at = tensor_name.rfind(kMark);
  if (at == std::string::npos) return false;
  const std::string part = tensor_name.substr(at + std::string(kMark).size());
  for (const char* known : {"down", "up", "scale", "positions", "values", "bias"})
    if (part == known) return true;
  return false;
}

std::vector<std::string> matrices_with_terms(const io::Checkpoint& checkpoint) {
  std::vector<std::string> matrices;
  for (const std::string& name : checkpoint.names()) {
    const size_t at = name.rfind(kMark);
    if (!is_term(name) || name.substr(at) != std::string(kMark) + "down") continue;
    const std::string matrix = name.substr(0, at);
    const auto elements = [&](const char* part) {
      const std::string of_part = matrix + kMark + part;
      return checkpoint.has(of_part) ? checkpoint.info(of_part).elements() : 0;
    };
    if (elements("down") + elements("values") + elements("bias") > 0) matrices.push_back(matrix);
  }
  return matrices;
}

AddedTerms prepared_terms(const AddedTerms& terms, at::ScalarType dtype) {
  AddedTerms prepared = terms;
  prepared.scale = 1;
  if (terms.low_rank()) {
    prepared.down = terms.down.to(dtype);
    prepared.up = scaled_up(terms).to(dtype).contiguous();
  }
  return prepared;
}

at::Tensor add_terms(const AddedTerms& terms, const at::Tensor& x, const at::Tensor& y) {
  at::Tensor sum = y;
  if (terms.low_rank()) sum = sum + linalg::linear(linalg::linear(x, terms.down), terms.up);
  if (terms.sparse()) {
    const int64_t in = x.size(1);
    const at::Tensor rows = at::floor_divide(terms.positions, in);
    const at::Tensor read = x.index_select(1, terms.positions.remainder(in)).to(at::kFloat);
    const at::Tensor part =
        at::zeros(y.sizes(), y.options().dtype(at::kFloat)).index_add(1, rows, read * terms.values);
    sum = sum + part.to(y.scalar_type());
  }
  return terms.bias.defined() ? sum + terms.bias.to(y.scalar_type()) : sum;
}

}  // namespace espalier::model
