#include <dlfcn.h>
#include <fmt/format.h>

#include <filesystem>

#include "pipeline/errors.h"
#include "pipeline/linalg/onednn/matmul.h"

namespace espalier::onednn {
namespace {

/// Beside the executable first (an installed tree), then where it was built.
Functions load() {
  const auto beside = std::filesystem::read_symlink("/proc/self/exe").parent_path() /
                      std::filesystem::path(ESPALIER_ONEDNN_MODULE).filename();
  const std::string file =
      std::filesystem::exists(beside) ? beside.string() : std::string(ESPALIER_ONEDNN_MODULE);
  void* module = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL | RTLD_DEEPBIND);
  if (module == nullptr)
    throw EnvironmentError(
        fmt::format("products: {} cannot be opened ({}); build it again", file, dlerror()));
  Functions functions{};
  const auto fill =
      reinterpret_cast<void (*)(Functions*)>(dlsym(module, "espalier_onednn_functions"));
  if (fill == nullptr) throw DefectError(fmt::format("products: {} is another library", file));
  fill(&functions);
  return functions;
}

const Functions& functions() {
  static const Functions loaded = load();
  return loaded;
}

}  // namespace

void matmul(const Operand& a, const Operand& b, const Operand& c, const void* bias, int64_t batch) {
  if (c.rows == 0 || c.columns == 0 || batch == 0) return;
  const std::string refused = functions().matmul(a, b, c, bias, batch);
  if (!refused.empty())
    throw DefectError(fmt::format("matmul: oneDNN refused [{} x {}] [{} x {}] x{}: {}", a.rows,
                                  a.columns, b.rows, b.columns, batch, refused));
}

std::string description() { return functions().description(); }

void one_thread() { functions().one_thread(); }

bool takes_bfloat16() { return functions().takes_bfloat16(); }

}  // namespace espalier::onednn
