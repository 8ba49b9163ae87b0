#include "engine/describe.h"

#include <algorithm>
#include <cstdio>
#include <utility>

namespace reducer::engine {
namespace {

// Of ranks, and of different calls; more are counted.
constexpr std::size_t kNamed = 16;

}  // namespace

std::string list(const std::vector<std::string>& names) {
  std::string text;
  for (std::size_t i = 0; i < names.size() && i < kNamed; ++i) text += (i ? ", " : "") + names[i];
  if (names.size() > kNamed) text += " and " + std::to_string(names.size() - kNamed) + " more";
  return text;
}

std::string seconds(Duration duration) {
  char text[32];
  std::snprintf(text, sizeof text, "%.1f s",
                std::chrono::duration_cast<std::chrono::duration<double>>(duration).count());
  return text;
}

std::string describeJoined(const Joined& joined) {
  if (joined.next == 0) return "; no collective is known that it joined";
  return "; the last collective it joined was #" + std::to_string(joined.next - 1) + ", " +
         describe(joined.call);
}

std::string describe(const wire::Call& call) {
  std::string text(nameOf(call.collective));
  if (call.collective == Collective::kBarrier) return text + "()";
  text += "(";
  if (call.op != ReduceOp::kNone) text += std::string(nameOf(call.op)) + ", ";
  text += std::string(nameOf(call.dtype)) + ", " + std::to_string(call.count) +
          (call.count == 1 ? " element" : " elements");
  if (call.root != kAllRanks) text += ", root " + std::to_string(call.root);
  return text + ")";
}

std::string nameRank(Rank rank, const std::string& host) {
  return "rank " + std::to_string(rank) + " (" + (host.empty() ? "has not connected" : host) + ")";
}

std::string nameCollective(const std::string& group, std::uint64_t number) {
  return "group '" + group + "', collective #" + std::to_string(number);
}

std::string describeMismatch(const std::string& operation, const std::vector<Called>& called) {
  std::vector<std::pair<std::string, std::vector<std::string>>> calls;
  for (const Called& one : called) {
    const std::string call = describe(one.call);
    auto same =
        std::find_if(calls.begin(), calls.end(), [&](const auto& c) { return c.first == call; });
    if (same == calls.end()) same = calls.insert(calls.end(), {call, {}});
    same->second.push_back(one.who);
  }
  std::string text = "ranks made different calls in " + operation + ": ";
  if (calls.size() == 1) {
    return text + "all called " + calls[0].first +
           ", but cut it into different chunks; are REDUCER_CHUNK_BYTES, REDUCER_ALGORITHM and "
           "REDUCER_SERVERS equal everywhere, or do the parts differ in size?";
  }
  for (std::size_t i = 0; i < calls.size() && i < kNamed; ++i) {
    text += (i ? "; " : "") + list(calls[i].second) + " called " + calls[i].first;
  }
  if (calls.size() > kNamed) {
    text += "; and " + std::to_string(calls.size() - kNamed) + " other calls";
  }
  return text + ". All ranks of a group must make the same calls in the same order.";
}

std::string describeWait(const std::string& operation, const wire::Call& call, Duration waited,
                         const std::vector<std::string>& missing,
                         const std::vector<std::string>& here) {
  return operation + ", " + describe(call) + ": timeout after " + seconds(waited) +
         ", waiting for " + list(missing) + "; here " + (here.size() == 1 ? "is " : "are ") +
         list(here);
}

std::string describeLate(const std::string& operation, const wire::Call& call, Duration waited,
                         Duration timeout, const std::vector<std::string>& missing) {
  char limit[32];
  std::snprintf(limit, sizeof limit, "%g s", std::chrono::duration<double>(timeout).count());
  return operation + ", " + describe(call) + ": " + list(missing) +
         (missing.size() == 1 ? " has" : " have") + " not arrived for " + seconds(waited) +
         " (timeout " + limit + ")";
}

}  // namespace reducer::engine
