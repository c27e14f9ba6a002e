#include "pipeline/linalg/onednn/matmul.h"

#include <fmt/format.h>
#include <omp.h>

#include <array>
#include <map>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>

namespace espalier::onednn {
namespace {

using Key = std::array<int64_t, 16>;

struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0xcbf29ce484222325ull;
    for (int64_t v : key) hash = (hash ^ static_cast<uint64_t>(v)) * 0x100000001b3ull;
    return hash;
  }
};

dnnl::engine& engine() {
  static dnnl::engine cpu(dnnl::engine::kind::cpu, 0);
  return cpu;
}

dnnl::memory::data_type type_of(Type type) {
  return type == Type::float32 ? dnnl::memory::data_type::f32 : dnnl::memory::data_type::bf16;
}

dnnl::memory::desc describe(const Operand& o, int64_t batch) {
  if (batch == 1) return {{o.rows, o.columns}, type_of(o.type), {o.row_stride, o.column_stride}};
  const int64_t repeats = o.batch_stride == 0 ? 1 : batch;
  const int64_t stride = o.batch_stride == 0 ? o.rows * o.columns : o.batch_stride;
  return {{repeats, o.rows, o.columns}, type_of(o.type), {stride, o.row_stride, o.column_stride}};
}

/// A compiled product with its memory handles, which are pointed at the data of each call.
struct Product {
  dnnl::matmul primitive;
  dnnl::memory a, b, c, bias, scratchpad;
};

Product compile(const Operand& a, const Operand& b, const Operand& c, bool with_bias,
                int64_t batch) {
  const auto da = describe(a, batch), db = describe(b, batch), dc = describe(c, batch);
  dnnl::memory::desc dbias;
  if (with_bias)
    dbias = batch == 1
                ? dnnl::memory::desc({1, c.columns}, type_of(c.type), {c.columns, 1})
                : dnnl::memory::desc({1, 1, c.columns}, type_of(c.type), {c.columns, c.columns, 1});
  const auto operation =
      with_bias ? dnnl::matmul::desc(da, db, dbias, dc) : dnnl::matmul::desc(da, db, dc);
  dnnl::primitive_attr attributes;
  attributes.set_scratchpad_mode(dnnl::scratchpad_mode::user);
  const dnnl::matmul::primitive_desc description(operation, attributes, engine());
  Product product{dnnl::matmul(description),
                  dnnl::memory(da, engine(), nullptr),
                  dnnl::memory(db, engine(), nullptr),
                  dnnl::memory(dc, engine(), nullptr),
                  {},
                  dnnl::memory(description.scratchpad_desc(), engine())};
  if (with_bias) product.bias = dnnl::memory(dbias, engine(), nullptr);
  return product;
}

Product& compiled(const Operand& a, const Operand& b, const Operand& c, bool with_bias,
                  int64_t batch) {
  thread_local std::unordered_map<Key, Product, KeyHash> products;
  const Key key{batch,          a.rows,
                a.columns,      c.columns,
                a.row_stride,   a.column_stride,
                b.row_stride,   b.column_stride,
                c.row_stride,   c.column_stride,
                a.batch_stride, b.batch_stride,
                c.batch_stride, int64_t(a.type) * 4 + int64_t(b.type) * 2 + int64_t(c.type),
                with_bias,      0};
  auto found = products.find(key);
  if (found == products.end())
    found = products.emplace(key, compile(a, b, c, with_bias, batch)).first;
  return found->second;
}

std::string run_matmul(const Operand& a, const Operand& b, const Operand& c, const void* bias,
                       int64_t batch) {
  try {
    thread_local dnnl::stream stream(engine());
    Product& product = compiled(a, b, c, bias != nullptr, batch);
    product.a.set_data_handle(const_cast<void*>(a.data));
    product.b.set_data_handle(const_cast<void*>(b.data));
    product.c.set_data_handle(const_cast<void*>(c.data));
    std::unordered_map<int, dnnl::memory> arguments{{DNNL_ARG_SRC, product.a},
                                                    {DNNL_ARG_WEIGHTS, product.b},
                                                    {DNNL_ARG_DST, product.c},
                                                    {DNNL_ARG_SCRATCHPAD, product.scratchpad}};
    if (bias != nullptr) {
      product.bias.set_data_handle(const_cast<void*>(bias));
      arguments[DNNL_ARG_BIAS] = product.bias;
    }
    product.primitive.execute(stream, arguments);
  } catch (const dnnl::error& error) {
    return error.what();
  }
  return {};
}

/// The sets are not ordered by their numbers alone: AVX2 with VNNI is no AVX-512.
bool reaches_avx512() {
  switch (dnnl::get_effective_cpu_isa()) {
    case dnnl::cpu_isa::avx512_core:
    case dnnl::cpu_isa::avx512_core_vnni:
    case dnnl::cpu_isa::avx512_core_bf16:
    case dnnl::cpu_isa::avx512_core_amx:
      return true;
    default:
      return false;
  }
}

std::string describe_library() {
  static const std::map<dnnl::cpu_isa, const char*> names{
      {dnnl::cpu_isa::sse41, "sse41"},
      {dnnl::cpu_isa::avx, "avx"},
      {dnnl::cpu_isa::avx2, "avx2"},
      {dnnl::cpu_isa::avx512_core, "avx512_core"},
      {dnnl::cpu_isa::avx512_core_vnni, "avx512_core_vnni"},
      {dnnl::cpu_isa::avx512_core_bf16, "avx512_core_bf16"},
      {dnnl::cpu_isa::avx512_core_amx, "avx512_core_amx"}};
  const auto* version = dnnl::version();
  const auto found = names.find(dnnl::get_effective_cpu_isa());
  return fmt::format("oneDNN {}.{}.{} {}", version->major, version->minor, version->patch,
                     found == names.end() ? "other" : found->second);
}

}  // namespace
}  // namespace espalier::onednn

extern "C" __attribute__((visibility("default"))) void espalier_onednn_functions(
    espalier::onednn::Functions* functions) {
  *functions = {espalier::onednn::run_matmul, espalier::onednn::describe_library,
                [] { omp_set_num_threads(1); }, espalier::onednn::reaches_avx512};
}
