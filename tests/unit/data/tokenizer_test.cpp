#include "pipeline/data/tokenizer.h"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "pipeline/errors.h"
#include "pipeline/io/atomic_file.h"
#include "pipeline/io/checksum.h"
#include "pipeline/io/hdf5.h"

namespace espalier::data {
namespace {

namespace fs = std::filesystem;

fs::path in_temporary(const std::string& name) { return fs::path(testing::TempDir()) / name; }

fs::path set_made_by(const std::string& checksum) {
  const fs::path file = in_temporary("made-by.h5");
  io::Hdf5Writer writer(file);
  writer.write("/tokens", at::zeros({1}, at::kInt));
  if (!checksum.empty()) writer.attribute("/", "tokenizer_checksum", checksum);
  writer.commit();
  return file;
}

// FIPS 180-4, one block: SHA-256 of "abc".
const char* const kOfAbc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";

TEST(Tokenizer, ItsChecksumIsTheStandardsSha256) {
  const fs::path file = in_temporary("tokenizer.json");
  io::write_file(file, "abc");
  EXPECT_EQ(io::file_sha256(file), kOfAbc);
  io::write_file(file, "");
  EXPECT_EQ(io::file_sha256(file),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
}

TEST(Tokenizer, ASetOfAnotherOneIsRefusedWithBothFilesAndTheWayOut) {
  const fs::path tokenizer = in_temporary("tokenizer.json");
  io::write_file(tokenizer, "abc");
  EXPECT_TRUE(require_tokenizer(set_made_by(kOfAbc), tokenizer));
  EXPECT_FALSE(require_tokenizer(set_made_by(""), tokenizer));
  io::write_file(tokenizer, "abcd");
  const fs::path set = set_made_by(kOfAbc);
  try {
    require_tokenizer(set, tokenizer);
    ADD_FAILURE() << "accepted";
  } catch (const UserError& error) {
    const std::string message = error.what();
    for (const std::string& part : {set.string(), tokenizer.string(), std::string(kOfAbc),
                                    std::string("prepare_data.py --tokenizer")})
      EXPECT_NE(message.find(part), std::string::npos) << message;
  }
}

}  // namespace
}  // namespace espalier::data
