#include <hwy/targets.h>

#include "kernels/reduce.h"

namespace reducer::kernels {
namespace {

std::vector<std::int64_t> detect() {
  std::vector<std::int64_t> targets;
  for (std::int64_t rest = hwy::SupportedTargets() & HWY_TARGETS; rest != 0; rest &= rest - 1) {
    targets.push_back(rest & -rest);  // Highway numbers better sets lower
  }
  return targets;
}

/// Asked for once and before anything is pinned: a pin changes what Highway calls supported.
const std::vector<std::int64_t>& usable() {
  static const std::vector<std::int64_t> targets = detect();
  return targets;
}

}  // namespace

std::vector<std::string> instructionSets() {
  std::vector<std::string> names;
  for (const std::int64_t target : usable()) names.emplace_back(hwy::TargetName(target));
  return names;
}

bool pinInstructionSet(const std::string& name) {
  if (name.empty()) {
    hwy::SetSupportedTargetsForTest(0);
    return true;
  }
  for (const std::int64_t target : usable()) {
    if (name != hwy::TargetName(target)) continue;
    hwy::SetSupportedTargetsForTest(target);
    return true;
  }
  return false;
}

}  // namespace reducer::kernels
