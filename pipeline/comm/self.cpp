#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <iostream>

#include "pipeline/comm/backend.h"

namespace espalier::comm {
namespace {

/// One rank: every collective is the identity.
class SelfBackend final : public Backend {
 public:
  std::string name() const override { return "self"; }
  int rank() const override { return 0; }
  int size() const override { return 1; }
  double timeout_seconds() const override { return 600; }
  void all_reduce_sum(std::span<int64_t>) override {}
  void all_reduce_max(std::span<int64_t>) override {}
  void all_reduce_max(std::span<double>) override {}
  void broadcast(std::span<std::byte>, int) override {}
  std::vector<std::vector<std::byte>> all_gather(std::span<const std::byte> mine) override {
    return {std::vector<std::byte>(mine.begin(), mine.end())};
  }
  std::vector<std::vector<std::byte>> gather(std::span<const std::byte> mine, int) override {
    return all_gather(mine);
  }
  void barrier() override {}
  int64_t bytes_sent() const override { return 0; }
  [[noreturn]] void abort(const std::string& message, int exit_code) override {
    print_error(message);
    exit_now(exit_code);
  }
  void still_working() override {}
  void check_peers() override {}
};

}  // namespace

void print_error(const std::string& message) {
  std::cout.flush();
  std::cerr.flush();
  std::fflush(nullptr);
  const std::string line = "espalier: " + message + "\n";
  size_t written = 0;
  while (written < line.size()) {
    const ssize_t count = ::write(STDERR_FILENO, line.data() + written, line.size() - written);
    if (count <= 0) return;
    written += static_cast<size_t>(count);
  }
}

void exit_now(int exit_code) {
  std::cout.flush();
  std::cerr.flush();
  std::fflush(nullptr);
  std::_Exit(exit_code);
}

std::shared_ptr<Backend> self_backend() { return std::make_shared<SelfBackend>(); }

}  // namespace espalier::comm
