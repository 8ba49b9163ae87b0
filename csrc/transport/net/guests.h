// Connections, and streams on them, that were accepted and have not said who they are: so many, and
// no more, so that whoever opens connections and says nothing takes neither all descriptors nor all
// memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>

#include "transport/net/socket.h"

namespace reducer::transport::net {

class Guests;

/// What those are told for whom there is no place.
inline constexpr char kCrowded[] = "it has too many connections that have not said who they are";

/// One such connection's place, until leave() or the end. Thread safe.
class Guest {
 public:
  Guest(std::shared_ptr<Guests> guests, std::string host);
  ~Guest() { leave(); }
  Guest(const Guest&) = delete;
  Guest& operator=(const Guest&) = delete;
  /// It has said who it is, or is gone. Idempotent.
  void leave();
  /// A second place for the same address. Null as Guests::enter.
  std::shared_ptr<Guest> another();
  bool hasLeft() const { return left_; }

 private:
  const std::shared_ptr<Guests> guests_;
  const std::string host_;
  std::atomic<bool> left_{false};
};

/// Thread safety: every method, from any thread.
class Guests : public std::enable_shared_from_this<Guests> {
 public:
  /// A quarter of the descriptors that this process may have, and of these a quarter for each
  /// address.
  static std::shared_ptr<Guests> forThisProcess();
  Guests(std::size_t most, std::size_t most_of_one);

  /// Null if there are too many, in all or of this address. `peer`: "host:port".
  std::shared_ptr<Guest> enter(const std::string& peer);
  /// Somebody was sent away: counted.
  void refuse() { ++refused_; }
  std::uint64_t refused() const { return refused_; }
  /// Called, from any thread, when somebody has left. Not to come back here.
  void onLeft(std::function<void()> call);

 private:
  friend class Guest;
  std::shared_ptr<Guest> enterFrom(std::string host);
  void left(const std::string& host);

  const std::size_t most_;
  const std::size_t most_of_one_;
  std::atomic<std::uint64_t> refused_{0};
  std::mutex mutex_;
  std::size_t count_ = 0;
  std::unordered_map<std::string, std::size_t> count_of_;  // by address without port
  std::function<void()> on_left_;
};

}  // namespace reducer::transport::net
