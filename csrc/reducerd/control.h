// The control plane of a standalone reducer: reducer.v1.Control, health, reflection.
#pragma once

#include <atomic>
#include <functional>
#include <memory>

#include "server/server.h"
#include "server/tokens.h"

namespace grpc {
class ServerBuilder;
}

namespace reducer::reducerd {

/// Metadata of Stats and Drain.
inline constexpr char kTokenKey[] = "reducer-token";

/// Made before the server that it tells about, because gRPC takes its services when the transport
/// is made. Thread safe.
class Control {
 public:
  /// `tokens`: one of them has to come with Stats and Drain; null: none has to.
  explicit Control(std::shared_ptr<server::TokenFile> tokens);
  ~Control();
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  /// Adds the services to the builder of the data plane's listener.
  void configure(grpc::ServerBuilder& builder);
  /// From now on the services answer.
  void attach(server::ReducerServer& server);
  /// To be called before the server is destroyed: the services outlive it.
  void detach();
  /// Health becomes NOT_SERVING.
  void setServing(bool serving);

 private:
  struct Services;
  const std::unique_ptr<Services> services_;
};

}  // namespace reducer::reducerd
