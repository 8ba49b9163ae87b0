// The standard health service.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <unordered_set>

#include "health.grpc.pb.h"
#include "reducerd/calls.h"
#include "transport/net/guests.h"

namespace reducer::reducerd {

/// grpc.health.v1. Written here and not taken from gRPC, whose own service runs on the callback API
/// with threads of its own that would take events from the data plane's. Thread safe.
class Health {
 public:
  /// Places for Watch, in all and for one address.
  static constexpr std::size_t kWatchesMax = 16;
  static constexpr std::size_t kWatchesOfOneMax = 4;

  explicit Health(Calls& calls);

  grpc::Service* service() { return &service_; }
  /// Waits for the first calls.
  void serve();
  void set(bool serving);
  /// NOT_SERVING for good: whoever watches is told so, and sent away.
  void end();

 private:
  using Request = grpc::health::v1::HealthCheckRequest;
  using Reply = grpc::health::v1::HealthCheckResponse;
  class Watch;

  Reply::ServingStatus status() const { return serving_ ? Reply::SERVING : Reply::NOT_SERVING; }
  void tellAll();

  grpc::health::v1::Health::AsyncService service_;
  Calls& calls_;
  const Method<Request, Reply> check_;
  const std::shared_ptr<transport::net::Guests> places_ =
      std::make_shared<transport::net::Guests>(kWatchesMax, kWatchesOfOneMax);
  std::mutex mutex_;
  bool serving_ = false;
  bool ended_ = false;
  std::unordered_set<Watch*> watches_;
};

}  // namespace reducer::reducerd
