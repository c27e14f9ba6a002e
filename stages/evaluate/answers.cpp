#include "stages/evaluate/answers.h"

#include "pipeline/io/atomic_file.h"

namespace espalier::evaluate {

std::string write_answers(const driver::StageContext& context, const std::string& task,
                          int64_t count, const std::function<nlohmann::json(int64_t)>& line) {
  const std::string name = task + ".answers.jsonl";
  if (!context.run.group.is_root()) return name;
  io::AtomicFile file(context.directory / name);
  for (int64_t i = 0; i < count; ++i) file.write(line(i).dump() + "\n");
  file.commit();
  return name;
}

}  // namespace espalier::evaluate
