#include "stages/compress/quantization.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <cmath>
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

}  // namespace

int64_t packed_bytes(int64_t length, int64_t count, int64_t bits) {
  return (length * count * bits + 7) / 8;
}

QuantizedVectors quantize(const at::Tensor& vectors, int64_t bits) {
  require_bits(bits);
  const int64_t length = vectors.size(0), count = vectors.size(1);
  const at::Tensor rows = vectors.t().to(at::kFloat).contiguous();
  if (!at::isfinite(rows).all().item<bool>())
    throw NumericalError("a singular vector to quantize holds NaN or Inf");
  QuantizedVectors quantized{length, count, bits, {}, {}};
  quantized.codes = at::zeros({packed_bytes(length, count, bits)}, at::kByte);
  quantized.scales = at::zeros({count}, at::kHalf);
  const Levels levels(bits);
  BitWriter writer(quantized.codes.data_ptr<uint8_t>(), bits);
  for (int64_t j = 0; j < count; ++j) {
    const float* row = rows.data_ptr<float>() + j * length;
    const std::vector<float> values(row, row + length);
    auto& scale = quantized.scales.data_ptr<at::Half>()[j];
    scale = at::Half(float(search_step(values, levels) * std::sqrt(double(length))));
    const float step = float(double(float(scale)) / std::sqrt(double(length)));
    for (float value : values) writer.put(uint32_t(levels.code(value, step > 0 ? 1 / step : 0.0f)));
  }
  writer.finish();
  return quantized;
}

at::Tensor dequantize(const QuantizedVectors& quantized) {
  require_bits(quantized.bits);
  const int64_t length = quantized.length, count = quantized.count;
  at::Tensor rows = at::empty({count, length}, at::kDouble);
  const Levels levels(quantized.bits);
  BitReader reader(quantized.codes.data_ptr<uint8_t>(), quantized.bits);
  double* out = rows.data_ptr<double>();
  for (int64_t j = 0; j < count; ++j) {
    const double step =
        double(float(quantized.scales.data_ptr<at::Half>()[j])) / std::sqrt(double(length));
    for (int64_t i = 0; i < length; ++i)
      *out++ = (double(reader.get()) - double(levels.middle)) * step;
  }
  return rows.t().contiguous();
}

}  // namespace espalier::compress
