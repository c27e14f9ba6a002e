#include "stages/compress/ere.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "pipeline/linalg/svd.h"
#include "stages/compress/spectrum.h"
#include "tests/unit/compress/models.h"

namespace espalier::compress {
namespace {

struct Case {
  at::Tensor base, fine_tuned, delta;
  Decomposition known;
};

Case make_case(int64_t rows, int64_t columns, int64_t rank, at::ScalarType dtype = at::kFloat) {
  Case c;
  c.base = random_matrix(rows, columns, 1).to(dtype);
  c.fine_tuned = (c.base.to(at::kDouble) + decaying_matrix(rows, columns, 2) * 0.01).to(dtype);
  c.delta = difference(c.base, c.fine_tuned, "w");
  c.known = decompose(c.delta, rank, rank, 7);
  return c;
}

EncodedMatrix encode(const Case& c, int64_t bits, bool polar, EncodingErrors& errors,
                     bool mask = false) {
  return encode_matrix({c.base, c.delta, mask, c.known.u, c.known.values, c.known.v}, bits, polar,
                       &errors);
}

TEST(Ere, ErrorFallsWithEveryBitAndReachesThatOfTheTruncation) {
  const Case c = make_case(96, 64, 12, at::kDouble);
  const double truncation = std::sqrt(lost_energy(spectrum_of(c.known, 1), 12) / c.known.energy);
  double previous = 2;
  for (int64_t bits = 1; bits <= 8; ++bits) {
    EncodingErrors errors;
    const EncodedMatrix encoded = encode(c, bits, true, errors);
    const at::Tensor decoded = decode_matrix(encoded, c.base, true, at::kDouble);
    const double error = ((decoded - c.fine_tuned).norm() / c.delta.norm()).item<double>();
    EXPECT_NEAR(error, errors.total, 1e-9);
    EXPECT_LT(error, previous) << bits;
    EXPECT_GE(error, truncation);
    previous = error;
  }
  EXPECT_LT(previous, truncation * 1.01);
}

TEST(Ere, ThePolarFactorHelpsAfterTheRefit) {
  const Case c = make_case(160, 96, 16);
  for (int64_t bits = 1; bits <= 8; ++bits) {
    EncodingErrors with, without;
    encode(c, bits, true, with);
    encode(c, bits, false, without);
    EXPECT_LE(with.total, without.total * 1.001) << bits;
  }
}

TEST(Ere, TheDiagonalIsTheLeastSquaresOne) {
  const Case c = make_case(60, 40, 5);
  EncodingErrors errors;
  const EncodedMatrix encoded = encode(c, 3, true, errors);
  const at::Tensor u = linalg::polar_factor(dequantize(encoded.u));
  const at::Tensor v = linalg::polar_factor(dequantize(encoded.v));
  for (int64_t k = 0; k < 5; ++k) {  // u_k^T Delta v_k in a plain loop
    double sum = 0;
    for (int64_t i = 0; i < 60; ++i)
      for (int64_t j = 0; j < 40; ++j)
        sum += u[i][k].item<double>() * c.delta[i][j].item<double>() * v[j][k].item<double>();
    const double stored =
        encoded.diagonal[k].item<float>() * std::ldexp(1.0, int(encoded.exponent));
    EXPECT_NEAR(stored, sum, std::abs(sum) * 0x1p-10 + 1e-6);
  }
}

/// The columns of one side of the file by hand: bits one by one, then Newton-Schulz steps
/// X (3 I - X^T X) / 2 in plain loops until the columns are orthonormal. [length][count]
std::vector<std::vector<double>> plain_factor(const QuantizedVectors& q) {
  std::vector<std::vector<double>> x(q.length, std::vector<double>(q.count));
  const uint8_t* bytes = q.codes.data_ptr<uint8_t>();
  for (int64_t k = 0, bit = 0; k < q.count; ++k)
    for (int64_t i = 0; i < q.length; ++i) {
      int code = 0;
      for (int64_t b = 0; b < q.bits; ++b, ++bit) code |= (bytes[bit / 8] >> (bit % 8) & 1) << b;
      const double level = code - ((1 << q.bits) - 1) / 2.0;
      x[i][k] = level * q.scales[k].item<float>() / std::sqrt(double(q.length));
    }
  for (int step = 0; step < 60; ++step) {
    std::vector<std::vector<double>> m(q.count, std::vector<double>(q.count, 0));
    for (int64_t a = 0; a < q.count; ++a)
      for (int64_t b = 0; b < q.count; ++b) {
        for (int64_t i = 0; i < q.length; ++i) m[a][b] -= x[i][a] * x[i][b] / 2;
        if (a == b) m[a][b] += 1.5;
      }
    for (auto& row : x) {
      const auto old = row;
      for (int64_t b = 0; b < q.count; ++b) {
        row[b] = 0;
        for (int64_t a = 0; a < q.count; ++a) row[b] += old[a] * m[a][b];
      }
    }
  }
  return x;
}

TEST(Ere, DecodesAsTheFormatSaysInPlainLoops) {
  const Case c = make_case(40, 30, 4, at::kDouble);
  for (int64_t bits : {1, 3, 8}) {
    EncodingErrors errors;
    const EncodedMatrix encoded = encode(c, bits, true, errors);
    const auto u = plain_factor(encoded.u), v = plain_factor(encoded.v);
    const at::Tensor decoded = decode_matrix(encoded, c.base, true, at::kDouble);
    for (int64_t i = 0; i < 40; ++i)
      for (int64_t j = 0; j < 30; ++j) {
        double sum = c.base[i][j].item<double>();
        for (int64_t k = 0; k < 4; ++k)
          sum += u[i][k] * v[j][k] *
                 std::ldexp(double(encoded.diagonal[k].item<float>()), int(encoded.exponent));
        ASSERT_NEAR(decoded[i][j].item<double>(), sum, 1e-10);
      }
  }
}

TEST(Ere, OnAMaskedBaseZerosStayExactlyZeroAndTheRefitToTheMaskHelps) {
  Case c = make_case(80, 64, 8);
  const at::Tensor pruned = random_matrix(80, 64, 9) > 0;
  c.base.masked_fill_(pruned, 0);
  c.fine_tuned.masked_fill_(pruned, 0);
  ASSERT_TRUE(zeros_survive(c.base, c.fine_tuned));
  c.delta = difference(c.base, c.fine_tuned, "w");
  c.known = decompose(c.delta, 8, 8, 7);
  EncodingErrors masked, plain;
  const EncodedMatrix encoded = encode(c, 6, true, masked, true);
  const at::Tensor decoded = decode_matrix(encoded, c.base, true, at::kFloat);
  EXPECT_TRUE(at::equal(decoded == 0, c.base == 0));

  EncodedMatrix without = encode(c, 6, true, plain, false);
  without.mask_preserving = true;  // the same factors, D not refitted to the mask
  const at::Tensor other = decode_matrix(without, c.base, true, at::kFloat);
  EXPECT_LT((decoded - c.fine_tuned).norm().item<double>(),
            (other - c.fine_tuned).norm().item<double>());
}

TEST(Ere, AZeroThatTheFineTunedModelFilledIsNoMask) {
  const at::Tensor base = at::tensor({1.0f, 0.0f, 2.0f, 0.0f}).reshape({2, 2});
  EXPECT_TRUE(zeros_survive(base, base * 2));
  EXPECT_FALSE(zeros_survive(base, base + 1));
  EXPECT_FALSE(zeros_survive(at::ones({2, 2}), at::zeros({2, 2})));
}

TEST(Ere, ConvolutionKernelsAreFoldedAndComeBackInTheirShape) {
  const at::Tensor base = random_matrix(12, 3 * 2 * 2, 3).reshape({12, 3, 2, 2}).to(at::kFloat);
  const at::Tensor tuned = base + decaying_matrix(12, 12, 4).reshape({12, 3, 2, 2}).to(at::kFloat);
  const at::Tensor delta = difference(base, tuned, "conv");
  EXPECT_EQ(delta.sizes(), (std::vector<int64_t>{12, 12}));
  const auto known = decompose(delta, 12, 12, 0);
  const auto encoded = encode_matrix({base, delta, false, known.u, known.values, known.v}, 8, true);
  const at::Tensor decoded = decode_matrix(encoded, base, true, at::kFloat);
  EXPECT_EQ(decoded.sizes(), base.sizes());
  EXPECT_LT((decoded - tuned).norm().item<double>(), 0.02 * delta.norm().item<double>());
}

TEST(Ere, SpectrumStopsAtTheNumericalRank) {
  const at::Tensor delta = at::mm(random_matrix(50, 3, 5), random_matrix(3, 40, 6));
  const auto known = decompose(delta, 20, 20, 0);
  EXPECT_EQ(known.largest_rank, 3);
  EXPECT_EQ(known.values.numel(), 3);
  EXPECT_NEAR(lost_energy(spectrum_of(known, 1), 3), 0, 1e-9 * known.energy);
  EXPECT_EQ(decompose(at::zeros({5, 4}, at::kDouble), 2, 2, 0).largest_rank, 0);
}

}  // namespace
}  // namespace espalier::compress
