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

#include <cstddef>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

namespace reducer::torch_backend {

/// The two streams of one call: "down" to the host, "up" to the device. Thread safety: one thread
/// until the call is launched; giveBack() from any thread after that; the others by one thread at
/// the end.
class DeviceCopies {
 public:
  /// For tensors of `device`, called on the caller's thread.
  explicit DeviceCopies(c10::Device device);

  c10::Device device() const { return device_; }

  /// Pinned memory for the elements of `tensor` (contiguous, on the device), which it keeps.
  /// `reads`: fetch() brings the tensor's content into it; `writes`: giveBack() brings its content
  /// into the tensor.
  void* stage(const at::Tensor& tensor, bool reads, bool writes);

  /// Both streams go on behind what is queued on the caller's current stream. Once, after the last
  /// stage().
  void begin();
  /// Queues the copy of what lies behind `host` (memory of stage(), or a part of it).
  void fetch(const void* host, std::size_t nbytes);
  /// An event that follows all fetches so far.
  std::shared_ptr<c10::Event> fetched();
  /// Once, after the last fetch: the way back begins behind the way there.
  void launched();
  /// Queues the copy of a part into the tensor.
  void giveBack(const void* host, std::size_t nbytes);

  /// Runs `task` with the "up" stream as the device's current one.
  void onUpStream(const std::function<void()>& task) const;
  /// Follows everything that is queued on the way back.
  std::shared_ptr<c10::Event> finished();

 private:
  struct Staged {
    at::Tensor tensor;  // flat, on the device
    at::Tensor host;    // flat, pinned
    bool reads;
    bool writes;
  };
  std::shared_ptr<c10::Event> recorded(const c10::Stream& stream) const;
  void copy(const c10::Stream& stream, const void* host, std::size_t nbytes, bool to_host);

  const c10::Device device_;
  c10::Stream down_;
  c10::Stream up_;
  std::vector<Staged> staged_;
};

/// Makes the current stream of the event's device wait for it.
void blockCurrentStreamOn(const c10::Event& event);

/// Launches what has to wait for a copy, in the order of the calls: ranks must start their
/// operations in one order, and a copy takes another time on each. Keeps memory until the copies
/// from it are done.
///
/// Thread safety: every method, from any thread. The thread starts with the first use.
class LaunchQueue {
 public:
  LaunchQueue();
  /// stop() must have been called.
  ~LaunchQueue();
  LaunchQueue(const LaunchQueue&) = delete;
  LaunchQueue& operator=(const LaunchQueue&) = delete;

  /// Runs `task` behind all earlier ones and, if given, behind `ready`: on the caller's thread if
  /// that can be at once.
  void launch(std::shared_ptr<c10::Event> ready, std::function<void()> task);
  /// Drops `kept` when `event` has happened.
  void keep(std::shared_ptr<c10::Event> event, std::shared_ptr<const void> kept);
  /// Runs all that waits without waiting for events: the group was aborted, and what runs fails.
  void hurry();
  /// hurry(), then waits for the copies under way and joins the thread. Idempotent.
  void stop();

 private:
  struct State;
  static void run(State& state);
  static void start(const std::shared_ptr<State>& state);
  const std::shared_ptr<State> state_;
};

}  // namespace reducer::torch_backend
