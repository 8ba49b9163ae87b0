// Whether the other end of a connection lives, and when this one has to say so itself.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdio>

#include "common/clock.h"
#include "common/status.h"

namespace reducer::transport {

/// Of one end of a connection. What waits to be sent may take long to arrive, so both ends speak
/// four times in a heartbeat whatever they hear, and take the other for lost after one without a
/// word.
///
/// Thread safety: heard(), from any thread; the others, one call at a time.
class Pulse {
 public:
  enum class Verdict { kNothing, kSpeak, kSilent };

  /// A frame came.
  void heard() { heard_.store(true, std::memory_order_relaxed); }

  /// To be called several times in a heartbeat, which is not 0. A process that has not run itself
  /// for a while cannot judge others by their silence, and begins anew.
  Verdict feel(TimePoint now, Duration heartbeat) {
    const bool slept = now - last_felt_ >= heartbeat / 2;
    last_felt_ = now;
    if (heard_.exchange(false, std::memory_order_relaxed) || slept) last_heard_ = now;
    if (now - last_heard_ >= heartbeat) return Verdict::kSilent;
    if (now - last_spoke_ < heartbeat / 4) return Verdict::kNothing;
    last_spoke_ = now;
    return Verdict::kSpeak;
  }

  /// Why a silent connection is closed.
  static Status silence(Duration heartbeat) {
    char text[128];
    std::snprintf(text, sizeof text,
                  "silent for %g s: the process is stopped, or its host or the way to it is down",
                  std::chrono::duration<double>(heartbeat).count());
    return Status(Code::kUnavailable, text);
  }

 private:
  std::atomic<bool> heard_{false};
  TimePoint last_felt_;
  TimePoint last_heard_;
  TimePoint last_spoke_;
};

}  // namespace reducer::transport
