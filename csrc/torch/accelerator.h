// Tensors of an accelerator: copied to pinned host memory, and back, on streams of their own.
//
// Everything goes through c10's device-agnostic streams and events, so that nothing here is
// compiled for one vendor. A stream can wait for work that is already queued on another stream, and
// for nothing else: so Work::wait() holds the caller until the network part is over, and from there
// on only the caller's stream.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "common/status.h"
#include "torch/part.h"

namespace reducer::torch_backend {

/// The two streams of one call: "down" to the host, "up" to the device. A tensor is given a place
/// in an address range that has no memory; a part of it gets pinned memory when its turn comes.
/// Thread safety: one thread until the call is launched; load() and Loaded's methods from any
/// thread after that; finished() by one thread at the end.
class DeviceCopies {
 public:
  /// Part of a call in pinned memory.
  class Loaded {
   public:
    /// Queues the copies of the results to the device, and returns what follows them.
    std::shared_ptr<c10::Event> giveBack();

   private:
    friend class DeviceCopies;
    struct Piece {
      at::Tensor host;
      at::Tensor device;
      bool writes;
    };
    explicit Loaded(DeviceCopies& copies) : copies_(copies) {}
    DeviceCopies& copies_;
    std::vector<Piece> pieces_;
  };

  /// For tensors of `device`, called on the caller's thread.
  explicit DeviceCopies(c10::Device device);

  c10::Device device() const { return device_; }

  /// A place for the elements of `tensor` (contiguous, on the device), which it keeps. `reads`: the
  /// operation reads them; `writes`: it writes them.
  void* stage(const at::Tensor& tensor, bool reads, bool writes);

  /// Both streams go on behind what is queued on the caller's current stream. Once, after the last
  /// stage().
  void begin();

  /// Gives pinned memory to all places of a part, instead of which its pointers are put, and queues
  /// the copies to it. `fetched` gets what follows them.
  std::shared_ptr<Loaded> load(Part& part, std::shared_ptr<c10::Event>& fetched);

  /// Runs `task` with the "up" stream as the device's current one.
  void onUpStream(const std::function<void()>& task) const;
  /// Follows everything that is queued on both ways.
  std::shared_ptr<c10::Event> finished();

 private:
  struct Staged {
    std::uintptr_t begin;  // of its place
    at::Tensor tensor;     // flat, on the device
    bool reads;
    bool writes;
  };
  std::shared_ptr<c10::Event> recorded(const c10::Stream& stream) const;
  void* loadPiece(Loaded& loaded, const void* place, std::size_t nbytes);

  const c10::Device device_;
  c10::Stream down_;
  c10::Stream up_;
  std::uintptr_t next_place_;
  std::vector<Staged> staged_;
};

/// Makes the current stream of the event's device wait for it.
void blockCurrentStreamOn(const c10::Event& event);

/// Launches what has to be copied first, in the order of the calls: ranks must start their
/// operations in one order, and a copy takes another time on each. While one part is on the network
/// the next are copied, as many as the memory for it allows. Keeps memory until copies are done.
///
/// Thread safety: every method, from any thread. The thread starts with the first use.
class LaunchQueue {
 public:
  /// What a part holds of the pinned memory that is allowed; gone, others may have it.
  using Share = std::shared_ptr<void>;
  using Clock = std::chrono::steady_clock;
  struct Launch {
    Clock::time_point deadline = Clock::time_point::max();  ///< of the copies
    std::size_t nbytes = 0;                                 ///< of pinned memory
    /// Queues the copies; what follows them. None: there is nothing to copy.
    std::function<std::shared_ptr<c10::Event>(Share share)> prepare;
    /// Starts the operation; not Ok: ends it with this.
    std::function<void(const Status&)> start;
  };

  LaunchQueue();
  /// stop() must have been called.
  ~LaunchQueue();
  LaunchQueue(const LaunchQueue&) = delete;
  LaunchQueue& operator=(const LaunchQueue&) = delete;

  /// Starts it behind all earlier ones: on the caller's thread if that can be at once.
  void launch(Launch launch);
  /// Drops `kept` when `event` has happened.
  void keep(std::shared_ptr<c10::Event> event, std::shared_ptr<const void> kept);
  /// Ends all that waits: the group was aborted.
  void hurry();
  /// hurry(), then waits for the copies under way and joins the thread. Idempotent.
  void stop();

 private:
  struct State;
  static void run(const std::shared_ptr<State>& state);
  static void wake(const std::shared_ptr<State>& state);
  const std::shared_ptr<State> state_;
};

}  // namespace reducer::torch_backend
