// When the flight recorder is written to a file: at an error, and when a signal asks for it.
#pragma once

#include <atomic>
#include <mutex>
#include <string>
#include <thread>

#include "common/clock.h"
#include "common/status.h"
#include "recorder/recorder.h"

namespace reducer::recorder {

/// Writes `folder`/reducer-JOB/rankR.json, each time the whole file anew: a reader never sees half
/// of it. One at a time in a process. Thread safety: every method, from any thread.
///
/// While it lives, a nameless file that shows up in /proc/PID/fd as "reducer-recorder" tells
/// `reducer dump` process, signal, folder, job and groups.
///
/// The signal's handler only wakes the thread. If the process had a handler for it before, that one
/// is called, too. It stays installed when this object ends, so that a late signal harms nobody. In
/// a forked child it wakes nobody.
class Dumper {
 public:
  struct Options {
    std::string folder;  ///< empty: $TMPDIR, or /tmp
    int signal = 0;      ///< 0: none
    bool tells = true;   ///< one line on stderr for what was written
  };

  /// The recorder must outlive it.
  Dumper(Recorder& recorder, Options options);
  /// Writes what is still to be written, and joins the thread. Not in a forked child.
  ~Dumper();
  Dumper(const Dumper&) = delete;
  Dumper& operator=(const Dumper&) = delete;

  /// Writes now; where.
  Result<std::string> write(const std::string& reason);

 private:
  void announce();
  void run();
  /// Does what is due; when it wants to be called again at the latest.
  TimePoint serve(TimePoint now, bool stopping);
  void tell(const std::string& reason, Result<std::string> path, bool always);

  Recorder& recorder_;
  Options options_;  // constant after construction
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::string trouble_;                       // what is to be written about; empty: nothing
  TimePoint due_;                             // when
  TimePoint quiet_until_ = TimePoint::min();  // errors come in crowds
  std::string told_;                          // of this path
  std::mutex announcing_;
  int announcement_ = -1;
  std::thread thread_;
};

}  // namespace reducer::recorder
