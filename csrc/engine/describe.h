// The words in which errors of operations are told, wherever they are noticed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/clock.h"
#include "common/types.h"
#include "wire/frame.h"

namespace reducer::engine {

/// The last collective that a rank is known to have joined.
struct Joined {
  std::uint64_t next = 0;  ///< its number + 1; 0: none
  wire::Call call;

  void learn(const Joined& other) {
    if (other.next > next) *this = other;
  }
};

/// "; the last collective it joined was #117, all_reduce(sum, float32, 1000 elements)".
std::string describeJoined(const Joined& joined);

/// "2.5 s".
std::string seconds(Duration duration);

/// "all_reduce(sum, float32, 1000 elements)".
std::string describe(const wire::Call& call);

/// "rank 3 (host:pid)"; an empty `host`: it has not connected.
std::string nameRank(Rank rank, const std::string& host);

/// "rank 1 (a:311), rank 2 (c:97) and 5 more".
std::string list(const std::vector<std::string>& names);

/// "group 'default', collective #7".
std::string nameCollective(const std::string& group, std::uint64_t number);

struct Called {
  std::string who;  ///< nameRank()
  wire::Call call;
};
/// What ranks called that did not fit together, in the order of ranks.
std::string describeMismatch(const std::string& operation, const std::vector<Called>& called);

/// A timeout: who did not come, and who did.
std::string describeWait(const std::string& operation, const wire::Call& call, Duration waited,
                         const std::vector<std::string>& missing,
                         const std::vector<std::string>& here);

/// Long before the timeout: who has not come yet.
std::string describeLate(const std::string& operation, const wire::Call& call, Duration waited,
                         Duration timeout, const std::vector<std::string>& missing);

}  // namespace reducer::engine
