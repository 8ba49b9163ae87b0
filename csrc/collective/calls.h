// What every kind of group does with a call's arguments first.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <utility>

#include "collective/group.h"
#include "common/status.h"
#include "wire/frame.h"

namespace reducer::collective {

inline Status invalid(std::string text) { return Status(Code::kInvalidArgument, std::move(text)); }

inline std::size_t sum(std::span<const std::size_t> counts) {
  std::size_t total = 0;
  for (const std::size_t count : counts) total += count;
  return total;
}

inline wire::Call makeCall(Collective collective, ReduceOp op, DataType dtype, std::size_t count,
                           Rank root = kAllRanks) {
  wire::Call call;
  call.collective = collective;
  call.op = op;
  call.dtype = dtype;
  call.count = count;
  call.root = root;
  return call;
}

/// Each returns false, and has told `done` why, if the argument is wrong.
class CallChecks {
 protected:
  CallChecks(Rank rank, Rank world_size) : checked_rank_(rank), ranks_(world_size) {}

  static bool checkOp(ReduceOp op, DataType dtype, const Done& done) {
    if (op != ReduceOp::kNone && supports(op, dtype)) return true;
    done(invalid(std::string(nameOf(op)) + " has no meaning on " + std::string(nameOf(dtype))));
    return false;
  }
  template <class Told>
  bool checkRank(const char* what, Rank rank, const Told& done) const {
    if (rank >= 0 && rank < ranks_) return true;
    done(invalid(std::string(what) + " is " + std::to_string(rank) +
                 ", but the ranks of this group are 0 to " + std::to_string(ranks_ - 1)));
    return false;
  }
  bool checkPeer(Rank peer, const Done& done) const {
    if (peer != checked_rank_) return checkRank("peer", peer, done);
    done(invalid("rank " + std::to_string(checked_rank_) +
                 " cannot send to or receive from itself"));
    return false;
  }
  bool checkSize(const char* what, std::size_t size, const Done& done) const {
    if (size == static_cast<std::size_t>(ranks_)) return true;
    done(invalid(std::string(what) + " has " + std::to_string(size) +
                 " entries, one for each of the " + std::to_string(ranks_) + " ranks is needed"));
    return false;
  }
  bool checkOwn(std::size_t sent, std::size_t expected, const Done& done) const {
    if (sent == expected) return true;
    done(invalid("this rank sends itself " + std::to_string(sent) + " elements and expects " +
                 std::to_string(expected)));
    return false;
  }

 private:
  const Rank checked_rank_;
  const Rank ranks_;
};

}  // namespace reducer::collective
