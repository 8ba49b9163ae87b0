// What the parts of the engine share, and nobody else.
#pragma once

#include <string>
#include <utility>

#include "common/status.h"
#include "wire/frame.h"
#include "wire/lane.h"

namespace reducer::engine {

inline Status broken(std::string text) { return Status(Code::kInvalidArgument, std::move(text)); }

/// Whose memory that is, the caller knows.
inline Status noMemory() { return Status(Code::kResourceExhausted, ""); }

/// The ranks mean the same slot by these.
inline bool sameShape(const wire::Frame& a, const wire::Frame& b) {
  return a.call == b.call && a.pusher == b.pusher && a.puller == b.puller && a.offset == b.offset &&
         a.length == b.length;
}

/// One rank pushes: its bytes are handed on as they are.
inline bool hasOnePusher(const wire::Frame& frame) { return frame.pusher >= 0; }

inline std::pair<std::uint64_t, std::uint64_t> operationOf(const wire::SlotId& id) {
  return {wire::operationLane(id.lane), id.seq};
}

}  // namespace reducer::engine
