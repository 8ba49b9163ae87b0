#include "reducerd/control.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>

#include <condition_variable>
#include <mutex>
#include <utility>

#include "common/limits.h"
#include "health.grpc.pb.h"
#include "reducer.grpc.pb.h"

namespace reducer::reducerd {
namespace {

class ControlService final : public v1::Control::Service {
 public:
  explicit ControlService(std::shared_ptr<server::TokenFile> tokens) : tokens_(std::move(tokens)) {}

  /// Null: there is none. A call that is at work is waited for.
  void attach(server::ReducerServer* server) {
    const std::lock_guard lock(mutex_);
    server_ = server;
  }

  grpc::Status Stats(grpc::ServerContext* context, const v1::StatsRequest*,
                     v1::StatsReply* reply) override {
    if (!admits(*context)) return stranger();
    const std::lock_guard lock(mutex_);
    server::ReducerServer* server = server_;
    if (server == nullptr)
      return {grpc::StatusCode::UNAVAILABLE, "the reducer is starting or ending"};
    const server::ServerStats stats = server->stats();
    reply->set_memory_limit_bytes(stats.memory_limit_bytes);
    reply->set_reserved_bytes(stats.reserved_bytes);
    reply->set_held_bytes(stats.held_bytes);
    reply->set_held_bytes_max(stats.held_bytes_max);
    reply->set_pushed_bytes(stats.pushed_bytes);
    reply->set_result_bytes(stats.result_bytes);
    reply->set_slots_done(stats.slots_done);
    reply->set_slots_failed(stats.slots_failed);
    reply->set_slots_open(stats.slots_open);
    reply->set_connections(stats.connections);
    reply->set_refused(stats.refused);
    reply->set_damaged(stats.damaged);
    reply->set_draining(stats.draining);
    reply->set_uptime_s(stats.uptime_s);
    reply->set_protocol_version(kProtocolVersion);
    for (const server::GroupStats& group : stats.groups) {
      v1::GroupStats* one = reply->add_groups();
      one->set_job(group.job);
      one->set_group(group.group);
      one->set_world_size(static_cast<std::uint32_t>(group.world_size));
      one->set_connected(static_cast<std::uint32_t>(group.connected));
      one->set_reserved_bytes(group.reserved_bytes);
    }
    return grpc::Status::OK;
  }

  grpc::Status Drain(grpc::ServerContext* context, const v1::DrainRequest*,
                     v1::DrainReply* reply) override {
    if (!admits(*context)) return stranger();
    const std::lock_guard lock(mutex_);
    server::ReducerServer* server = server_;
    if (server == nullptr)
      return {grpc::StatusCode::UNAVAILABLE, "the reducer is starting or ending"};
    server->drain();
    reply->set_connections(server->stats().connections);
    return grpc::Status::OK;
  }

 private:
  bool admits(const grpc::ServerContext& context) {
    if (!tokens_) return true;
    const auto& metadata = context.client_metadata();
    const auto found = metadata.find(kTokenKey);
    return found != metadata.end() && tokens_->admits({found->second.data(), found->second.size()});
  }
  static grpc::Status stranger() {
    return {
        grpc::StatusCode::PERMISSION_DENIED,
        "it answers only to who has a token of its jobs; set REDUCER_TOKEN_FILE (--token-file)"};
  }

  const std::shared_ptr<server::TokenFile> tokens_;
  std::mutex mutex_;
  server::ReducerServer* server_ = nullptr;
};

// grpc.health.v1. Written here and not taken from gRPC, whose own service runs on the callback API
// with threads of its own that would take events from the data plane's; Watch is a poll in one of
// the few control threads.
class HealthService final : public grpc::health::v1::Health::Service {
 public:
  using Reply = grpc::health::v1::HealthCheckResponse;

  void set(bool serving) {
    const std::lock_guard lock(mutex_);
    serving_ = serving;
    changed_.notify_all();
  }

  grpc::Status Check(grpc::ServerContext*, const grpc::health::v1::HealthCheckRequest* request,
                     Reply* reply) override {
    if (!known(request->service())) {
      return {grpc::StatusCode::NOT_FOUND, "no service '" + request->service() + "' here"};
    }
    const std::lock_guard lock(mutex_);
    reply->set_status(status());
    return grpc::Status::OK;
  }

  grpc::Status Watch(grpc::ServerContext* context,
                     const grpc::health::v1::HealthCheckRequest* request,
                     grpc::ServerWriter<Reply>* writer) override {
    Reply reply;
    if (!known(request->service())) {
      reply.set_status(Reply::SERVICE_UNKNOWN);
      writer->Write(reply);
      return {grpc::StatusCode::NOT_FOUND, "no service '" + request->service() + "' here"};
    }
    std::unique_lock lock(mutex_);
    for (auto last = Reply::UNKNOWN; !context->IsCancelled();) {
      if (status() != last) {
        last = status();
        reply.set_status(last);
        lock.unlock();
        if (!writer->Write(reply)) return grpc::Status::OK;
        lock.lock();
      }
      changed_.wait_for(lock, std::chrono::milliseconds(500));
    }
    return grpc::Status::OK;
  }

 private:
  static bool known(const std::string& service) {
    return service.empty() || service == "reducer.v1.Data";
  }
  Reply::ServingStatus status() const { return serving_ ? Reply::SERVING : Reply::NOT_SERVING; }

  std::mutex mutex_;
  std::condition_variable changed_;
  bool serving_ = false;
};

}  // namespace

struct Control::Services {
  explicit Services(std::shared_ptr<server::TokenFile> tokens) : control(std::move(tokens)) {}
  ControlService control;
  HealthService health;
};

Control::Control(std::shared_ptr<server::TokenFile> tokens)
    : services_(std::make_unique<Services>(std::move(tokens))) {
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
}

Control::~Control() = default;

void Control::configure(grpc::ServerBuilder& builder) {
  builder.RegisterService(&services_->control);
  builder.RegisterService(&services_->health);
  // Every thread that waits here also takes events of the data plane: no more than one at rest.
  builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 1);
}

void Control::attach(server::ReducerServer& server) {
  services_->control.attach(&server);
  services_->health.set(true);
}

void Control::detach() {
  services_->health.set(false);
  services_->control.attach(nullptr);
}

void Control::setServing(bool serving) { services_->health.set(serving); }

}  // namespace reducer::reducerd
