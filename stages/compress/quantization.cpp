#include "stages/compress/quantization.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "pipeline/errors.h"

namespace espalier::compress {
namespace {

/// Nearest code and its level in units of the step.
struct Levels {
  explicit Levels(int64_t bits) : highest(float((1 << bits) - 1)), middle(highest / 2) {}
  float code(float value, float inverse_step) const {
    // floor(x + 1/2): half up, whatever the rounding mode of the processor.
    return std::clamp(std::floor(value * inverse_step + middle + 0.5f), 0.0f, highest);
  }
  float highest, middle;
};

/// Sums over one vector at one step: value x level, level^2.
struct Moments {
  double product = 0, square = 0;
  double best_step() const { return square > 0 ? product / square : 0; }
  /// What the squared error is below ||values||^2 when `step` is used with these codes.
  double gain(double step) const { return 2 * step * product - step * step * square; }
};

Moments moments_at(const std::vector<float>& values, const Levels& levels, double step) {
  const float inverse = float(1 / step);
  Moments moments;
  // Eight independent sums: the compiler may keep them in one register, the order is fixed.
  double product[8] = {}, square[8] = {};
  for (size_t i = 0; i < values.size(); ++i) {
    const float level = levels.code(values[i], inverse) - levels.middle;
    product[i & 7] += double(values[i]) * level;
    square[i & 7] += double(level) * level;
  }
  for (int lane = 0; lane < 8; ++lane) {
    moments.product += product[lane];
    moments.square += square[lane];
  }
  return moments;
}

double search_step(const std::vector<float>& values, const Levels& levels) {
  float largest = 0;
  for (float value : values) largest = std::max(largest, std::abs(value));
  if (largest == 0) return 0;
  double best_step = 0, best_gain = -1;
  for (double clip = 1.0; clip > 0.2; clip -= 0.06) {
    double step = clip * double(largest) / levels.middle;
    Moments moments = moments_at(values, levels, step);
    for (int round = 0; round < 2; ++round) {
      step = moments.best_step();
      moments = moments_at(values, levels, step);
    }
    if (moments.gain(step) > best_gain) {
      best_gain = moments.gain(step);
      best_step = step;
    }
    if (levels.highest == 1) break;  // the sign: every start has the same codes
  }
  return best_step;
}

/// Codes one after the other, least significant bit first.
class BitWriter {
 public:
  BitWriter(uint8_t* out, int64_t bits) : out_(out), bits_(bits) {}
  void put(uint32_t code) {
    buffer_ |= code << filled_;
    for (filled_ += bits_; filled_ >= 8; filled_ -= 8, buffer_ >>= 8) *out_++ = uint8_t(buffer_);
  }
  void finish() {
    if (filled_ > 0) *out_ = uint8_t(buffer_);
  }

 private:
  uint8_t* out_;
  int64_t bits_, filled_ = 0;
  uint32_t buffer_ = 0;
};

class BitReader {
 public:
  BitReader(const uint8_t* in, int64_t bits) : in_(in), bits_(bits) {}
  uint32_t get() {
    for (; filled_ < bits_; filled_ += 8) buffer_ |= uint32_t(*in_++) << filled_;
    const uint32_t code = buffer_ & ((1u << bits_) - 1);
    buffer_ >>= bits_;
    filled_ -= bits_;
    return code;
  }

 private:
  const uint8_t* in_;
  int64_t bits_, filled_ = 0;
  uint32_t buffer_ = 0;
};

void require_bits(int64_t bits) {
  if (bits < 1 || bits > 8) throw DefectError(fmt::format("quantization to {} bits", bits));
}

void require_finite(const at::Tensor& rows) {
  if (!at::isfinite(rows).all().item<bool>())
    throw NumericalError("a singular vector or a difference to quantize holds NaN or Inf");
}

/// Codes of one row, and its scale.
at::Half put_row(const std::vector<float>& values, int64_t length, const Levels& levels,
                 BitWriter& writer) {
  const at::Half scale(float(search_step(values, levels) * std::sqrt(double(length))));
  const float step = float(double(float(scale)) / std::sqrt(double(length)));
  for (float value : values) writer.put(uint32_t(levels.code(value, step > 0 ? 1 / step : 0.0f)));
  return scale;
}

double step_of(const QuantizedVectors& quantized, int64_t row) {
  const at::Half scale = quantized.scales.const_data_ptr<at::Half>()[row];
  return double(float(scale)) / std::sqrt(double(quantized.length));
}

QuantizedVectors to_half(const at::Tensor& rows, int64_t length, int64_t count) {
  const at::Tensor halves = (rows.to(at::kDouble) * std::sqrt(double(length))).to(at::kHalf);
  at::Tensor codes = at::empty({packed_bytes(length, count, kHalfBits)}, at::kByte);
  if (codes.numel() > 0) std::memcpy(codes.data_ptr(), halves.const_data_ptr(), codes.nbytes());
  return {length, count, kHalfBits, codes, at::empty({0}, at::kHalf)};
}

at::Tensor from_half(const QuantizedVectors& quantized) {
  at::Tensor halves = at::empty({quantized.count, quantized.length}, at::kHalf);
  if (halves.numel() > 0)
    std::memcpy(halves.data_ptr(), quantized.codes.const_data_ptr(), halves.nbytes());
  return halves.to(at::kDouble) / std::sqrt(double(quantized.length));
}

}  // namespace

int64_t packed_bytes(int64_t length, int64_t count, int64_t bits) {
  return (length * count * bits + 7) / 8;
}

int64_t scales_of(int64_t count, int64_t bits) { return bits == kHalfBits ? 0 : count; }

QuantizedVectors quantize(const at::Tensor& vectors, int64_t bits) {
  const at::Tensor rows = vectors.t().to(at::kFloat).contiguous();
  if (bits != kHalfBits) return quantize_rows(rows, {}, bits);
  require_finite(rows);
  return to_half(rows, vectors.size(0), vectors.size(1));
}

at::Tensor dequantize(const QuantizedVectors& quantized) {
  return (quantized.bits == kHalfBits ? from_half(quantized) : dequantize_rows(quantized, {}))
      .t()
      .contiguous();
}

QuantizedVectors quantize_rows(const at::Tensor& values, const at::Tensor& kept, int64_t bits) {
  require_bits(bits);
  const at::Tensor rows = values.to(at::kFloat).contiguous();
  require_finite(rows);
  const int64_t count = rows.size(0), length = rows.size(1);
  const at::Tensor mask = kept.defined() ? kept.contiguous() : kept;
  const int64_t codes = kept.defined() ? mask.sum().item<int64_t>() : rows.numel();
  QuantizedVectors quantized{length, count, bits, {}, {}};
  quantized.codes = at::zeros({packed_bytes(codes, 1, bits)}, at::kByte);
  quantized.scales = at::zeros({count}, at::kHalf);
  const Levels levels(bits);
  BitWriter writer(quantized.codes.data_ptr<uint8_t>(), bits);
  std::vector<float> of_row;
  for (int64_t j = 0; j < count; ++j) {
    of_row.clear();
    for (int64_t i = j * length; i < (j + 1) * length; ++i)
      if (!mask.defined() || mask.const_data_ptr<bool>()[i])
        of_row.push_back(rows.const_data_ptr<float>()[i]);
    quantized.scales.data_ptr<at::Half>()[j] = put_row(of_row, length, levels, writer);
  }
  writer.finish();
  return quantized;
}

at::Tensor dequantize_rows(const QuantizedVectors& quantized, const at::Tensor& kept) {
  require_bits(quantized.bits);
  const int64_t count = quantized.count, length = quantized.length;
  const at::Tensor mask = kept.defined() ? kept.contiguous() : kept;
  const int64_t codes = kept.defined() ? mask.sum().item<int64_t>() : count * length;
  if (quantized.codes.numel() != packed_bytes(codes, 1, quantized.bits))
    throw UserError(
        fmt::format("{} bytes of codes stand for {} entries of {} bits: the residual was written "
                    "against another mask",
                    quantized.codes.numel(), codes, quantized.bits));
  at::Tensor rows = at::zeros({count, length}, at::kDouble);
  const Levels levels(quantized.bits);
  BitReader reader(quantized.codes.const_data_ptr<uint8_t>(), quantized.bits);
  double* out = rows.data_ptr<double>();
  for (int64_t j = 0; j < count; ++j) {
    const double step = step_of(quantized, j);
    for (int64_t i = j * length; i < (j + 1) * length; ++i)
      if (!mask.defined() || mask.const_data_ptr<bool>()[i])
        out[i] = (double(reader.get()) - double(levels.middle)) * step;
  }
  return rows;
}

}  // namespace espalier::compress
