// The control plane of a standalone reducer: reducer.v1.Control, health, reflection.
#pragma once

#include <memory>

#include "server/server.h"
#include "server/tokens.h"

namespace grpc {
class ServerBuilder;
class ServerCompletionQueue;
}  // namespace grpc

namespace reducer::reducerd {

/// Metadata of Stats and Drain.
inline constexpr char kTokenKey[] = "reducer-token";

struct ControlOptions {
  /// Of jobs: its groups are all that one of them sees, and where it is the only one and there are
  /// no operators it may drain. Null: there are none.
  std::shared_ptr<server::TokenFile> tokens;
  /// Of operators, who see all groups and may drain. Null: there are none; then, without `tokens`,
  /// everybody is one.
  std::shared_ptr<server::TokenFile> admin_tokens;
  /// Its services are described to whoever asks, by a service of gRPC's that holds threads for it.
  bool reflects = false;
};

/// Made before the server that it tells about, because gRPC takes its services when the transport
/// is made, and destroyed after the transport. Thread safe.
class Control {
 public:
  explicit Control(ControlOptions options);
  ~Control();
  Control(const Control&) = delete;
  Control& operator=(const Control&) = delete;

  /// Adds the services to the builder of the data plane's listener.
  void configure(grpc::ServerBuilder& builder);
  /// Waits for calls on the queue that the data plane's threads serve.
  void serve(grpc::ServerCompletionQueue& queue);
  /// From now on the services answer.
  void attach(server::ReducerServer& server);
  /// To be called before server and transport are destroyed: the services outlive them. Whoever
  /// watches the health is told, and sent away.
  void detach();
  /// Health becomes NOT_SERVING.
  void setServing(bool serving);

 private:
  struct Services;
  const std::unique_ptr<Services> services_;
};

}  // namespace reducer::reducerd
