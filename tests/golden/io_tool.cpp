// Lets other people's readers and writers be held against ours:
//   io_tool list DIR                  the tensors of a model as JSON: dtype, shape, sum in double
//   io_tool dense DIR OUT DTYPE BYTES the model written dense, in shards of at most BYTES
//   io_tool h5 IN OUT                 the float32 datasets of IN's root and two of its attributes

#include <ATen/ATen.h>

#include <iostream>
#include <string>
#include <vector>

#include "pipeline/errors.h"
#include "pipeline/io/checkpoint.h"
#include "pipeline/io/hdf5.h"

namespace {

using namespace espalier;

void list(const std::string& directory) {
  const io::Checkpoint model = io::Checkpoint::open(directory);
  nlohmann::json tensors = nlohmann::json::object();
  for (const std::string& name : model.names()) {
    tensors[name] = {{"dtype", io::safetensors_dtype(model.info(name).dtype)},
                     {"shape", model.info(name).shape},
                     {"sum", model.view(name).to(at::kDouble).sum().item<double>()}};
  }
  std::cout << nlohmann::json{{"tensors", tensors}, {"checksum", model.tensors_checksum()}};
}

void dense(const std::string& directory, const std::string& out, const std::string& dtype,
           int64_t bytes) {
  const auto type = dtype == "float32" ? at::kFloat : at::kBFloat16;
  io::write_dense(io::Checkpoint::open(directory), out, type, bytes);
}

void copy_hdf5(const std::string& in, const std::string& out) {
  const io::Hdf5Reader reader(in);
  io::Hdf5Writer writer(out);
  for (const std::string& name : reader.children()) {
    writer.write(name, reader.read(name, at::kFloat));
  }
  writer.attribute("/", "kind", reader.text_attribute("/", "kind"));
  writer.attribute("/", "count", reader.integer_attribute("/", "count"));
  writer.commit();
}

}  // namespace

int main(int count, char** values) {
  const std::vector<std::string> words(values + 1, values + count);
  try {
    if (words.size() == 2 && words[0] == "list") {
      list(words[1]);
    } else if (words.size() == 5 && words[0] == "dense") {
      dense(words[1], words[2], words[3], std::stoll(words[4]));
    } else if (words.size() == 3 && words[0] == "h5") {
      copy_hdf5(words[1], words[2]);
    } else {
      std::cerr << "usage: io_tool list DIR | dense DIR OUT DTYPE BYTES | h5 IN OUT\n";
      return kExitConfiguration;
    }
  } catch (const Error& error) {
    std::cerr << "espalier: " << error.what() << "\n";
    return error.exit_code();
  }
  return 0;
}
