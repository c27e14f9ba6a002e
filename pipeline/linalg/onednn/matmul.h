#pragma once
/// oneDNN's matrix product behind a header that names neither oneDNN nor ATen.
///
/// LibTorch carries another version of oneDNN and exports some of its inline functions, which would
/// take the place of this one's (its jit products then fail). So matmul.cpp is a module of its own,
/// libespalier_onednn.so, opened with RTLD_DEEPBIND: it sees its own symbols first. load.cpp opens
/// it.

#include <cstdint>
#include <string>

namespace espalier::onednn {

enum class Type : int { float32, bfloat16 };

/// A batch of matrices in memory; strides in elements, one of the last two is 1. A batch stride of
/// 0 repeats one matrix.
struct Operand {
  const void* data;
  Type type;
  int64_t rows, columns;
  int64_t row_stride, column_stride;
  int64_t batch_stride = 0;
};

/// The module's functions.
struct Functions {
  /// Empty on success, otherwise what oneDNN said.
  std::string (*matmul)(const Operand& a, const Operand& b, const Operand& c, const void* bias,
                        int64_t batch);
  std::string (*description)();
  void (*one_thread)();
  bool (*takes_bfloat16)();
};

/// c[i] = a[i] b[i] (+ bias [columns of c], float32 when c is float32, else c's type) for i <
/// batch. On the calling thread, with its OpenMP thread count. Compiled products are kept a shape a
/// thread.
void matmul(const Operand& a, const Operand& b, const Operand& c, const void* bias = nullptr,
            int64_t batch = 1);

/// The library's version and the instruction set it takes here: "oneDNN 2.6.3 avx512_core_bf16".
std::string description();

/// The OpenMP thread count of the calling thread becomes 1.
void one_thread();

/// False where the processor is below AVX-512: oneDNN then refuses bfloat16 operands.
bool takes_bfloat16();

}  // namespace espalier::onednn
