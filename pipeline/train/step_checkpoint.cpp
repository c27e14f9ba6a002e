#include "pipeline/train/step_checkpoint.h"

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "pipeline/errors.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/hdf5.h"

namespace espalier::train {

namespace {

template <class T>
at::Tensor as_tensor(const std::vector<T>& values, at::ScalarType type) {
  const at::Tensor out = at::empty({static_cast<int64_t>(values.size())}, type);
  std::copy(values.begin(), values.end(), out.data_ptr<T>());
  return out;
}

template <class T>
std::vector<T> as_vector(const at::Tensor& values) {
  const at::Tensor whole = values.contiguous();
  const T* data = whole.const_data_ptr<T>();
  return {data, data + whole.numel()};
}

std::string contents_checksum(const StepCheckpoint& c) {
  std::string text =
      fmt::format("{} {} {} {} {} {} {} {}", c.fingerprint, c.step, c.tokens, c.values.size(),
                  c.validations, c.best_step, c.unimproved, c.best_score);
  for (const auto& bytes :
       {std::as_bytes(std::span(c.values)), std::as_bytes(std::span(c.first_moment)),
        std::as_bytes(std::span(c.second_moment)), std::as_bytes(std::span(c.largest)),
        std::as_bytes(std::span(c.best_values))})
    text += io::checksum(bytes);
  return io::checksum(text);
}

}  // namespace

void write_step_checkpoint(const std::filesystem::path& file, const StepCheckpoint& checkpoint) {
  io::Hdf5Writer writer(file);
  writer.write("/values", as_tensor(checkpoint.values, at::kFloat));
  writer.write("/first_moment", as_tensor(checkpoint.first_moment, at::kFloat));
  writer.write("/second_moment", as_tensor(checkpoint.second_moment, at::kFloat));
  writer.write("/largest", as_tensor(checkpoint.largest, at::kDouble));
  if (!checkpoint.best_values.empty())
    writer.write("/best_values", as_tensor(checkpoint.best_values, at::kFloat));
  writer.attribute("/", "step", checkpoint.step);
  writer.attribute("/", "tokens", checkpoint.tokens);
  writer.attribute("/", "loss_first", checkpoint.loss_first);
  writer.attribute("/", "loss_last", checkpoint.loss_last);
  writer.attribute("/", "seconds", checkpoint.seconds);
  writer.attribute("/", "validations", checkpoint.validations);
  writer.attribute("/", "best_step", checkpoint.best_step);
  writer.attribute("/", "unimproved", checkpoint.unimproved);
  writer.attribute("/", "best_score", checkpoint.best_score);
  writer.attribute("/", "fingerprint", checkpoint.fingerprint);
  writer.attribute("/", "checksum", contents_checksum(checkpoint));
  writer.commit();
}

std::optional<StepCheckpoint> read_step_checkpoint(const std::filesystem::path& file,
                                                   const std::string& fingerprint,
                                                   int64_t parameters, int64_t segments) {
  if (!std::filesystem::exists(file)) return std::nullopt;
  const io::Hdf5Reader reader(file);
  StepCheckpoint c;
  c.fingerprint = reader.text_attribute("/", "fingerprint");
  if (c.fingerprint != fingerprint)
    throw UserError(fmt::format(
        "{}: was saved by a training with other settings, data or model; choose another "
        "run.dir or pass run.resume=false",
        file.string()));
  c.step = reader.integer_attribute("/", "step");
  c.tokens = reader.integer_attribute("/", "tokens");
  c.loss_first = reader.number_attribute("/", "loss_first");
  c.loss_last = reader.number_attribute("/", "loss_last");
  c.seconds = reader.number_attribute("/", "seconds");
  c.values = as_vector<float>(reader.read("/values", at::kFloat));
  c.first_moment = as_vector<float>(reader.read("/first_moment", at::kFloat));
  c.second_moment = as_vector<float>(reader.read("/second_moment", at::kFloat));
  c.largest = as_vector<double>(reader.read("/largest", at::kDouble));
  c.validations = reader.integer_attribute("/", "validations");
  c.best_step = reader.integer_attribute("/", "best_step");
  c.unimproved = reader.integer_attribute("/", "unimproved");
  c.best_score = reader.number_attribute("/", "best_score");
  if (reader.has("/best_values"))
    c.best_values = as_vector<float>(reader.read("/best_values", at::kFloat));
  const auto size = static_cast<size_t>(parameters);
  const bool fits = c.values.size() == size && c.first_moment.size() == size &&
                    c.second_moment.size() == size &&
                    (c.best_values.empty() || c.best_values.size() == size) &&
                    c.largest.size() == static_cast<size_t>(segments);
  if (!fits || reader.text_attribute("/", "checksum") != contents_checksum(c))
    throw UserError(
        fmt::format("{}: the saved training state is damaged; remove it, and training starts from "
                    "its first step",
                    file.string()));
  return c;
}

}  // namespace espalier::train
