#include "pipeline/io/packed_tensor.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <vector>

#include "pipeline/errors.h"

namespace espalier::io {
namespace {

static_assert(std::endian::native == std::endian::little, "words are stored as they lie in memory");
constexpr int64_t kWordBits = 64, kWordBytes = 8;

int64_t words_of(int64_t bits) { return bits / kWordBits + (bits % kWordBits != 0 ? 1 : 0); }

uint64_t word_at(const uint8_t* bytes, int64_t word) {
  uint64_t bits = 0;
  std::memcpy(&bits, bytes + kWordBytes * word, sizeof bits);
  return bits;
}

void set_word(uint8_t* bytes, int64_t word, uint64_t bits) {
  std::memcpy(bytes + kWordBytes * word, &bits, sizeof bits);
}

/// The `count` <= 32 bits from bit `first` on.
uint64_t bits_at(const uint8_t* bytes, int64_t first, int64_t count) {
  const int64_t word = first / kWordBits, shift = first % kWordBits;
  uint64_t bits = word_at(bytes, word) >> shift;
  if (shift + count > kWordBits) bits |= word_at(bytes, word + 1) << (kWordBits - shift);
  return bits & ((uint64_t{1} << count) - 1);
}

/// Appends numbers of a few bits each.
class BitWriter {
 public:
  explicit BitWriter(uint8_t* bytes) : bytes_(bytes) {}
  void put(uint64_t number, int width) {
    bits_ |= number << used_;
    used_ += width;
    if (used_ < kWordBits) return;
    set_word(bytes_, words_++, bits_);
    used_ -= kWordBits;
    bits_ = number >> (width - used_);
  }
  void end() {
    if (used_ > 0) set_word(bytes_, words_, bits_);
  }

 private:
  uint8_t* bytes_;
  int64_t words_ = 0;
  uint64_t bits_ = 0;
  int64_t used_ = 0;
};

int index_bits(int64_t group) {
  return static_cast<int>(std::bit_width(static_cast<uint64_t>(group - 1)));
}

/// call.operator()<Element>() with the unsigned integer of the dtype's size.
template <typename Call>
void with_element(at::ScalarType dtype, const Call& call) {
  switch (c10::elementSize(dtype)) {
    case 1:
      return call.template operator()<uint8_t>();
    case 2:
      return call.template operator()<uint16_t>();
    case 4:
      return call.template operator()<uint32_t>();
    case 8:
      return call.template operator()<uint64_t>();
    default:
      throw DefectError(fmt::format("{} cannot be packed", c10::toString(dtype)));
  }
}

template <typename Element>
const Element* elements_of(const at::Tensor& tensor) {
  return static_cast<const Element*>(tensor.const_data_ptr());
}

template <typename Element>
Element* elements_of(at::Tensor& tensor) {
  return static_cast<Element*>(tensor.mutable_data_ptr());
}

/// Bit i tells whether element i of 64 is a value. The first loop is vector instructions; the
/// product moves the lowest bits of eight bytes into its highest byte.
template <typename Element>
uint64_t marks_of(const Element* elements) {
  uint8_t marks[kWordBits];
  for (int64_t i = 0; i < kWordBits; ++i) marks[i] = elements[i] != 0;
  uint64_t bits = 0;
  for (int64_t byte = 0; byte < kWordBytes; ++byte)
    bits |= (word_at(marks, byte) * 0x0102040810204080U) >> 56 << (8 * byte);
  return bits;
}

template <typename Element>
void mark_values(const Element* elements, int64_t count, uint8_t* bits) {
  const int64_t whole = count / kWordBits;
  for (int64_t w = 0; w < whole; ++w) set_word(bits, w, marks_of(elements + kWordBits * w));
  if (whole * kWordBits == count) return;
  Element rest[kWordBits] = {};
  std::copy(elements + whole * kWordBits, elements + count, rest);
  set_word(bits, whole, marks_of(rest));
}

/// The bits of a bitmask.
at::Tensor value_bits(const at::Tensor& tensor) {
  at::Tensor bits = at::empty({kWordBytes * words_of(tensor.numel())}, at::kByte);
  with_element(tensor.scalar_type(), [&]<typename Element>() {
    mark_values(elements_of<Element>(tensor), tensor.numel(), bits.data_ptr<uint8_t>());
  });
  return bits;
}

/// Bits set in the first `words` words.
int64_t ones(const uint8_t* bits, int64_t words) {
  int64_t count = 0;
  for (int64_t w = 0; w < words; ++w) count += std::popcount(word_at(bits, w));
  return count;
}

/// call(i) of every bit i that is set.
template <typename Call>
void for_each_one(const uint8_t* bits, int64_t words, const Call& call) {
  for (int64_t w = 0; w < words; ++w)
    for (uint64_t rest = word_at(bits, w); rest != 0; rest &= rest - 1)
      call(kWordBits * w + std::countr_zero(rest));
}

// ---------------------------------------------------------------------------------- patterns
Packing with_pattern(Packing packing, int64_t keep, int64_t group, size_t axis) {
  packing.keep = keep;
  packing.group = group;
  packing.axis = axis;
  packing.values = packing.dense.elements() / group * keep;
  return packing;
}

struct Fullest {
  int64_t values = 0;  ///< of the groups with the most values
  int64_t groups = 0;  ///< so many have as many
};

/// Looks no further once a group has more than `most` values.
Fullest fullest_groups(const uint8_t* bits, int64_t elements, int64_t group, int64_t most) {
  Fullest fullest;
  for (int64_t first = 0; first < elements && fullest.values <= most; first += group) {
    const int64_t values = std::popcount(bits_at(bits, first, group));
    if (values > fullest.values) fullest = {values, 0};
    if (values == fullest.values) ++fullest.groups;
  }
  return fullest;
}

/// The smallest N:M of at most `limit` bytes that a matrix has along `axis`; `bits` are those of
/// the matrix with that dimension last.
std::optional<Packing> smallest_pattern(const Packing& bitmask, const at::Tensor& bits, size_t axis,
                                        int64_t limit) {
  const int64_t elements = bitmask.dense.elements();
  std::optional<Packing> best;
  for (int64_t group = 2; group <= kLargestGroup; ++group) {
    if (bitmask.dense.shape[axis] % group != 0) continue;
    int64_t most = 0;
    while (most + 1 < group && with_pattern(bitmask, most + 1, group, axis).bytes() <= limit)
      ++most;
    const Fullest fullest = fullest_groups(bits.const_data_ptr<uint8_t>(), elements, group, most);
    if (fullest.values > most || fullest.groups < elements / group - fullest.groups) continue;
    best = with_pattern(bitmask, fullest.values, group, axis);
    limit = best->bytes() - 1;
  }
  return best;
}

template <typename Element>
void pack_groups(const Packing& packing, const Element* elements, const uint8_t* bits,
                 Element* values, uint8_t* indices) {
  const int64_t count = packing.dense.elements(), keep = packing.keep, group = packing.group;
  const int width = index_bits(group);
  BitWriter writer(indices);
  for (int64_t first = 0; first < count; first += group) {
    uint64_t places = bits_at(bits, first, group);
    if (std::popcount(places) > keep)
      throw DefectError("a tensor is packed as " + packing.name() + " and has not the pattern");
    while (std::popcount(places) < keep) places |= places + 1;  // the lowest that is free
    for (; places != 0; places &= places - 1) {
      const int place = std::countr_zero(places);
      *values++ = elements[first + place];
      writer.put(static_cast<uint64_t>(place), width);
    }
  }
  writer.end();
}

[[noreturn]] void refuse(const std::string& where, const std::string& problem) {
  throw UserError(fmt::format("{}: {}; the file is damaged, copy it again", where, problem));
}

template <typename Element>
void unpack_groups(const Packing& packing, const Element* values, const uint8_t* indices,
                   Element* elements, const std::string& where) {
  const int64_t count = packing.dense.elements(), keep = packing.keep, group = packing.group;
  const int width = index_bits(group);
  int64_t next = 0;
  for (int64_t first = 0; first < count; first += group) {
    int64_t before = -1;
    for (const int64_t end = next + keep; next < end; ++next) {
      const auto place = static_cast<int64_t>(bits_at(indices, next * width, width));
      if (place <= before || place >= group)
        refuse(where,
               fmt::format("index {} of group {} is {}, after {}; those of {} increase from "
                           "0 to {}",
                           next % keep, first / group, place, before, packing.name(), group - 1));
      elements[first + place] = values[next];
      before = place;
    }
  }
}

/// Which of the stored values an element is; -1: none.
int64_t value_in_groups(const Packing& packing, const uint8_t* indices, int64_t element) {
  const int64_t rows = packing.dense.shape[0], columns = packing.dense.shape[1];
  if (packing.axis == 0) element = element % columns * rows + element / columns;
  const int width = index_bits(packing.group);
  const int64_t first = element / packing.group * packing.keep;
  for (int64_t value = first; value < first + packing.keep; ++value)
    if (static_cast<int64_t>(bits_at(indices, value * width, width)) == element % packing.group)
      return value;
  return -1;
}

/// No bit set leads past the elements or past the values.
void check_bits(const Packing& packing, const uint8_t* bits, const std::string& where) {
  const int64_t elements = packing.dense.elements(), words = words_of(elements);
  const int64_t used = elements % kWordBits;
  if (used != 0 && word_at(bits, words - 1) >> used != 0)
    refuse(where, fmt::format("bits are set behind those of its {} elements", elements));
  const int64_t count = ones(bits, words);
  if (count != packing.values)
    refuse(where, fmt::format("{} bits are set for {} values", count, packing.values));
}

double log2_choose(double n, double k) {
  return (std::lgamma(n + 1) - std::lgamma(k + 1) - std::lgamma(n - k + 1)) / std::log(2.0);
}

}  // namespace

std::string Packing::name() const {
  return bitmask() ? "bitmask" : fmt::format("{}:{}", keep, group);
}

const char* Packing::places_suffix() const { return bitmask() ? ".bits" : ".indices"; }

int64_t Packing::places_bytes() const {
  return kWordBytes * words_of(bitmask() ? dense.elements() : values * index_bits(group));
}

int64_t Packing::bytes() const {
  return values * static_cast<int64_t>(c10::elementSize(dense.dtype)) + places_bytes();
}

double Packing::bound_bits() const {
  const auto count = static_cast<double>(values), elements = static_cast<double>(dense.elements());
  const double of_values = 8 * static_cast<double>(c10::elementSize(dense.dtype)) * count;
  if (bitmask()) return of_values + log2_choose(elements, count);
  const auto n = static_cast<double>(keep), m = static_cast<double>(group);
  return of_values + elements / m * log2_choose(m, n);
}

std::optional<Packing> packing_for(const at::Tensor& tensor, PackFormat format) {
  if (format == PackFormat::dense || tensor.dim() < 2) return std::nullopt;
  const at::Tensor bits = value_bits(tensor);
  const auto bytes = static_cast<int64_t>(tensor.nbytes());
  Packing bitmask;
  bitmask.dense = {tensor.scalar_type(), tensor.sizes().vec(), 0, bytes};
  bitmask.values = ones(bits.const_data_ptr<uint8_t>(), words_of(tensor.numel()));
  if (bitmask.bytes() >= bytes) return std::nullopt;  // then every pattern takes more, too
  if (format == PackFormat::nm && tensor.dim() == 2 && bitmask.values > 0) {
    if (const auto along_rows = smallest_pattern(bitmask, bits, 1, bytes - 1)) return along_rows;
    if (const auto along_columns =
            smallest_pattern(bitmask, value_bits(tensor.t().contiguous()), 0, bytes - 1))
      return along_columns;
  }
  return bitmask;
}

PackedTensor pack(const at::Tensor& tensor, const Packing& packing) {
  const bool columns = !packing.bitmask() && packing.axis == 0;
  const at::Tensor source = columns ? tensor.t().contiguous() : tensor;
  PackedTensor packed{at::empty({packing.values}, tensor.options()), value_bits(source)};
  const auto* bits = packed.places.const_data_ptr<uint8_t>();
  const int64_t words = words_of(source.numel());
  if (source.numel() != packing.dense.elements() ||
      (packing.bitmask() && ones(bits, words) != packing.values))
    throw DefectError("a tensor is not the one that its packing was chosen for");
  at::Tensor indices =
      packing.bitmask() ? at::Tensor() : at::empty({packing.places_bytes()}, at::kByte);
  with_element(tensor.scalar_type(), [&]<typename Element>() {
    const auto* elements = elements_of<Element>(source);
    auto* values = elements_of<Element>(packed.values);
    if (packing.bitmask())
      for_each_one(bits, words, [&](int64_t i) { *values++ = elements[i]; });
    else
      pack_groups(packing, elements, bits, values, indices.data_ptr<uint8_t>());
  });
  if (!packing.bitmask()) packed.places = indices;
  return packed;
}

at::Tensor unpack(const Packing& packing, const PackedTensor& packed, const std::string& where) {
  const auto* places = packed.places.const_data_ptr<uint8_t>();
  if (packing.bitmask()) check_bits(packing, places, where);
  const std::vector<int64_t>& shape = packing.dense.shape;
  const bool columns = !packing.bitmask() && packing.axis == 0;
  at::Tensor dense = at::zeros(columns ? std::vector<int64_t>{shape[1], shape[0]} : shape,
                               at::TensorOptions().dtype(packing.dense.dtype));
  with_element(packing.dense.dtype, [&]<typename Element>() {
    const auto* values = elements_of<Element>(packed.values);
    auto* elements = elements_of<Element>(dense);
    if (packing.bitmask())
      for_each_one(places, words_of(dense.numel()), [&](int64_t i) { elements[i] = *values++; });
    else
      unpack_groups(packing, values, places, elements, where);
  });
  return columns ? dense.t().contiguous() : dense;
}

std::string unpack_bytes(const Packing& packing, const PackedTensor& packed, int64_t begin,
                         int64_t count, const std::string& where) {
  const auto size = static_cast<int64_t>(c10::elementSize(packing.dense.dtype));
  const int64_t first = begin / size, end = (begin + count + size - 1) / size;
  const auto* places = packed.places.const_data_ptr<uint8_t>();
  const auto* values = static_cast<const char*>(packed.values.const_data_ptr());
  int64_t next = 0;  // of the values of a bitmask
  if (packing.bitmask()) {
    check_bits(packing, places, where);
    next = ones(places, first / kWordBits);
    for (int64_t i = first / kWordBits * kWordBits; i < first; ++i)
      next += static_cast<int64_t>(bits_at(places, i, 1));
  }
  std::string bytes(static_cast<size_t>((end - first) * size), '\0');
  for (int64_t i = first; i < end; ++i) {
    int64_t value = -1;
    if (!packing.bitmask())
      value = value_in_groups(packing, places, i);
    else if (bits_at(places, i, 1) != 0)
      value = next++;
    if (value >= 0)
      std::memcpy(bytes.data() + (i - first) * size, values + value * size,
                  static_cast<size_t>(size));
  }
  return bytes.substr(static_cast<size_t>(begin - first * size), static_cast<size_t>(count));
}

}  // namespace espalier::io
