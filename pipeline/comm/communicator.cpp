#include "pipeline/comm/communicator.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>

#include "pipeline/comm/backend.h"
#include "pipeline/comm/launcher.h"
#include "pipeline/errors.h"

namespace espalier::comm {
namespace {

constexpr size_t kShownLine = 200;

/// Line `number` of a text, shortened for a message.
std::string line_of(const std::string& text, size_t number) {
  size_t begin = 0;
  for (size_t i = 0; i < number && begin != std::string::npos; ++i) {
    begin = text.find('\n', begin);
    if (begin != std::string::npos) ++begin;
  }
  if (begin == std::string::npos || begin >= text.size()) return "(nothing)";
  const std::string line = text.substr(begin, text.find('\n', begin) - begin);
  return line.size() <= kShownLine ? line : line.substr(0, kShownLine) + "...";
}

DeviceBackend& device_of(const std::shared_ptr<DeviceBackend>& device, const char* operation) {
  if (!device) throw DefectError(fmt::format("{} on a group without NCCL", operation));
  return *device;
}

void check_root(int root, int size) {
  if (root < 0 || root >= size)
    throw DefectError(fmt::format("root {} of a group of {}", root, size));
}

}  // namespace

Communicator Communicator::self() { return Communicator(self_backend()); }

Communicator Communicator::world(double timeout_seconds) {
  const Launcher launcher = find_launcher();
  if (!launcher.present && !launcher.initialized) {
    require_group_size(launcher, 1);
    return self();
  }
  auto backend = mpi_backend(timeout_seconds);
  require_group_size(launcher, backend->size());
  return Communicator(std::move(backend));
}

Communicator Communicator::with_nccl(int device) const {
  return Communicator(backend_, nccl_backend(backend_, device));
}

int Communicator::rank() const { return backend_->rank(); }
int Communicator::size() const { return backend_->size(); }
std::string Communicator::backend() const { return device_ ? device_->name() : backend_->name(); }

void Communicator::all_reduce_sum(std::span<int64_t> values) const {
  backend_->all_reduce_sum(values);
}
void Communicator::all_reduce_max(std::span<int64_t> values) const {
  backend_->all_reduce_max(values);
}
void Communicator::all_reduce_max(std::span<double> values) const {
  backend_->all_reduce_max(values);
}

void Communicator::broadcast(std::span<std::byte> bytes, int root) const {
  check_root(root, size());
  backend_->broadcast(bytes, root);
}

std::string Communicator::broadcast(const std::string& text, int root) const {
  check_root(root, size());
  auto length = static_cast<int64_t>(text.size());
  broadcast(bytes_of(std::span<int64_t>(&length, 1)), root);
  std::string received = rank() == root ? text : std::string(length, '\0');
  broadcast(bytes_of(std::span<char>(received)), root);
  return received;
}

std::vector<std::vector<std::byte>> Communicator::all_gather(
    std::span<const std::byte> mine) const {
  return backend_->all_gather(mine);
}

std::vector<std::vector<std::byte>> Communicator::gather(std::span<const std::byte> mine,
                                                         int root) const {
  check_root(root, size());
  return backend_->gather(mine, root);
}

void Communicator::barrier() const { backend_->barrier(); }

void Communicator::still_working() const { backend_->still_working(); }

void Communicator::require_same(const std::string& what, const std::string& text) const {
  const std::string expected = broadcast(text, 0);
  // The largest size - rank belongs to the first rank that differs.
  int64_t found = text == expected ? 0 : size() - rank();
  all_reduce_max(std::span<int64_t>(&found, 1));
  if (found == 0) return;
  const int first = size() - static_cast<int>(found);
  std::string difference;
  if (rank() == first) {
    const auto at = std::mismatch(text.begin(), text.end(), expected.begin(), expected.end()).first;
    const auto number = static_cast<size_t>(std::count(text.begin(), at, '\n'));
    difference = fmt::format("line {}: '{}' there, '{}' on rank 0", number + 1,
                             line_of(text, number), line_of(expected, number));
  }
  difference = broadcast(difference, first);
  throw UserError(
      fmt::format("rank {} has another {} than rank 0 ({}); start all ranks with one command, one "
                  "build and the "
                  "same files",
                  first, what, difference));
}

void Communicator::all_reduce_sum_device(void* int64_values, int64_t count, void* stream) const {
  device_of(device_, "all_reduce_sum_device").all_reduce_sum(int64_values, count, stream);
}

void Communicator::broadcast_device(void* bytes, int64_t count, int root, void* stream) const {
  check_root(root, size());
  device_of(device_, "broadcast_device").broadcast(bytes, count, root, stream);
}

int64_t Communicator::bytes_sent() const {
  return backend_->bytes_sent() + (device_ ? device_->bytes_sent() : 0);
}

void Communicator::abort(const std::string& message, int exit_code) const {
  backend_->abort(message, exit_code);
  std::abort();  // not reached: g++ does not see that a virtual function never returns
}

}  // namespace espalier::comm
