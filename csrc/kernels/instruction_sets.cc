#include <hwy/targets.h>

#include "kernels/reduce.h"

namespace reducer::kernels {
namespace {

std::vector<std::int64_t> usable() {
  hwy::SetSupportedTargetsForTest(0);
  std::vector<std::int64_t> targets;
  for (std::int64_t rest = hwy::SupportedTargets() & HWY_TARGETS; rest != 0; rest &= rest - 1) {
    targets.push_back(rest & -rest);  // Highway numbers better sets lower
  }
  return targets;
}

}  // namespace

std::vector<std::string> instructionSets() {
  std::vector<std::string> names;
  for (const std::int64_t target : usable()) names.emplace_back(hwy::TargetName(target));
  return names;
}

bool pinInstructionSet(const std::string& name) {
  for (const std::int64_t target : usable()) {
    if (name != hwy::TargetName(target)) continue;
    hwy::SetSupportedTargetsForTest(target);
    return true;
  }
  return name.empty();
}

}  // namespace reducer::kernels
