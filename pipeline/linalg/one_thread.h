#pragma once
/// One library thread while the guard lives, whatever the calling thread had before.

#include <ATen/Parallel.h>

namespace espalier::linalg {

class OneThread {
 public:
  OneThread() : before_(at::get_num_threads()) {
    if (before_ != 1) at::set_num_threads(1);
  }
  ~OneThread() {
    if (before_ != 1) at::set_num_threads(before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int before_;
};

}  // namespace espalier::linalg
