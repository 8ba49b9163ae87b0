// What the conformance suite observes with: handlers that remember, and payloads that tell when
// they are released.
#pragma once

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "common/payload.h"
#include "frames.h"
#include "transport/transport.h"

namespace reducer::testing {

/// Every wait of the suite ends by then.
inline constexpr auto kDeadline = std::chrono::seconds(10);

/// A number that other threads raise and a test waits for.
class Counter {
 public:
  void raise() {
    const std::lock_guard lock(mutex_);
    ++value_;
    changed_.notify_all();
  }
  std::size_t value() const {
    const std::lock_guard lock(mutex_);
    return value_;
  }
  bool waitFor(std::size_t value) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kDeadline, [&] { return value_ >= value; });
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::size_t value_ = 0;
};

/// Remembers what came, and sees to it that the contract of Handler is kept.
class Recorder : public transport::Handler {
 public:
  using Hook = std::function<void(Recorder&, const wire::Frame&, const Payload&)>;
  struct Arrived {
    wire::Frame frame;
    std::vector<std::byte> payload;
  };

  explicit Recorder(Hook hook = nullptr) : hook_(std::move(hook)) {}

  void onFrame(wire::Frame frame, Payload payload) override {
    EXPECT_FALSE(in_call_.exchange(true)) << "two calls of one connection at once";
    {
      const std::lock_guard lock(mutex_);
      EXPECT_EQ(closes_, 0) << "a frame after onClosed";
      arrived_.push_back({frame, copyOf(payload)});
      changed_.notify_all();
    }
    if (hook_) hook_(*this, frame, payload);
    in_call_ = false;
  }

  void onClosed(const Status& reason) override {
    EXPECT_FALSE(in_call_.exchange(true)) << "two calls of one connection at once";
    const std::lock_guard lock(mutex_);
    ++closes_;
    EXPECT_EQ(closes_, 1) << "onClosed twice";
    reason_ = reason;
    changed_.notify_all();
    in_call_ = false;
  }

  void hold(std::shared_ptr<transport::Connection> connection) {
    const std::lock_guard lock(mutex_);
    connection_ = std::move(connection);
  }
  std::shared_ptr<transport::Connection> connection() const {
    const std::lock_guard lock(mutex_);
    return connection_;
  }
  void drop() {
    std::unique_lock lock(mutex_);
    const auto dropped = std::move(connection_);
    connection_ = nullptr;
    lock.unlock();  // the destructor is the transport's code
  }

  bool waitForFrames(std::size_t count) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kDeadline, [&] { return arrived_.size() >= count; });
  }
  bool waitForClose() {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, kDeadline, [&] { return closes_ > 0; });
  }

  std::vector<Arrived> arrived() const {
    const std::lock_guard lock(mutex_);
    return arrived_;
  }
  int closes() const {
    const std::lock_guard lock(mutex_);
    return closes_;
  }
  Status reason() const {
    const std::lock_guard lock(mutex_);
    return reason_;
  }

 private:
  const Hook hook_;
  std::atomic<bool> in_call_ = false;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Arrived> arrived_;
  int closes_ = 0;
  Status reason_;
  std::shared_ptr<transport::Connection> connection_;
};

/// Frame number `seq` for a payload of this size.
inline wire::Frame numbered(std::uint64_t seq, std::size_t payload_nbytes) {
  wire::Frame frame;
  frame.kind = wire::FrameKind::kPush;
  frame.slot.seq = seq;
  frame.length = payload_nbytes;
  return frame;
}

inline std::vector<std::byte> pattern(std::uint64_t seq, std::size_t nbytes) {
  std::vector<std::byte> bytes(nbytes);
  for (std::size_t i = 0; i < nbytes; ++i)
    bytes[i] = static_cast<std::byte>(seq * 31 + i * 7 + i / 251);
  return bytes;
}

/// The pattern in up to `pieces` pieces; `released` rises when the transport lets go of the last
/// reference.
inline Payload patternPayload(std::uint64_t seq, std::size_t nbytes, std::size_t pieces,
                              std::shared_ptr<Counter> released) {
  struct Owner {
    ~Owner() { released->raise(); }
    std::vector<std::byte> bytes;
    std::shared_ptr<Counter> released;
  };
  auto owner = std::make_shared<Owner>();
  owner->bytes = pattern(seq, nbytes);
  owner->released = std::move(released);
  std::vector<Bytes> parts;
  const Bytes all(owner->bytes);
  for (std::size_t i = 0; i < pieces; ++i) {
    const std::size_t begin = nbytes * i / pieces;
    const std::size_t end = nbytes * (i + 1) / pieces;
    if (end > begin) parts.push_back(all.subspan(begin, end - begin));
  }
  return Payload(std::move(parts), std::move(owner));
}

/// Expects frames first, first + 1, ... `count` of them, each with its pattern of `nbytes(seq)`
/// bytes.
template <class F>
void expectNumbered(const Recorder& recorder, std::uint64_t first, std::size_t count, F nbytes) {
  const auto arrived = recorder.arrived();
  ASSERT_EQ(arrived.size(), count);
  for (std::size_t i = 0; i < count; ++i) {
    const std::uint64_t seq = first + i;
    ASSERT_EQ(arrived[i].frame.slot.seq, seq);
    ASSERT_EQ(arrived[i].payload, pattern(seq, nbytes(seq)));
  }
}

}  // namespace reducer::testing
