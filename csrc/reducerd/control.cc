#include "reducerd/control.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/resource_quota.h>

#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "reducer.grpc.pb.h"
#include "reducerd/calls.h"
#include "reducerd/health.h"

namespace reducer::reducerd {
namespace {

// Of gRPC, for reflection, which is a synchronous service: each who asks holds one while it likes.
// Who comes when all are held is told RESOURCE_EXHAUSTED.
constexpr int kThreadsMax = 8;

/// Reflection: its library adds it to every server of the process.
class WithoutPlugins final : public grpc::ServerBuilderOption {
 public:
  void UpdateArguments(grpc::ChannelArguments* /*arguments*/) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->clear();
  }
};

enum class Caller { kStranger, kJob, kOperator };

grpc::Status denied(const std::string& why) { return {grpc::StatusCode::PERMISSION_DENIED, why}; }

class ControlService {
 public:
  ControlService(Calls& calls, std::shared_ptr<server::TokenFile> tokens,
                 std::shared_ptr<server::TokenFile> admin_tokens)
      : tokens_(std::move(tokens)),
        admin_tokens_(std::move(admin_tokens)),
        stats_{calls,
               [this](auto* context, auto* request, auto* writer, auto* queue, void* tag) {
                 service_.RequestStats(context, request, writer, queue, queue, tag);
               },
               [this](const auto& context, const auto&, v1::StatsReply& reply) {
                 return stats(tokenOf(context), reply);
               }},
        drain_{calls,
               [this](auto* context, auto* request, auto* writer, auto* queue, void* tag) {
                 service_.RequestDrain(context, request, writer, queue, queue, tag);
               },
               [this](const auto& context, const auto&, v1::DrainReply& reply) {
                 return drain(tokenOf(context), reply);
               }} {}

  grpc::Service* service() { return &service_; }
  /// Waits for the first calls.
  void serve() {
    Call<v1::StatsRequest, v1::StatsReply>::next(stats_);
    Call<v1::DrainRequest, v1::DrainReply>::next(drain_);
  }
  /// Null: there is none. A call that is at work is waited for.
  void attach(server::ReducerServer* server) {
    const std::lock_guard lock(mutex_);
    server_ = server;
  }

 private:
  grpc::Status stats(const std::string& token, v1::StatsReply& reply) {
    const Caller caller = know(token);
    if (caller == Caller::kStranger) return stranger();
    const std::lock_guard lock(mutex_);
    if (server_ == nullptr) return absent();
    const bool all = caller == Caller::kOperator;
    const server::ServerStats stats =
        server_->stats(all ? std::nullopt : std::optional<std::string_view>(token));
    reply.set_memory_limit_bytes(stats.memory_limit_bytes);
    reply.set_reserved_bytes(stats.reserved_bytes);
    reply.set_held_bytes(stats.held_bytes);
    reply.set_held_bytes_max(stats.held_bytes_max);
    reply.set_pushed_bytes(stats.pushed_bytes);
    reply.set_result_bytes(stats.result_bytes);
    reply.set_slots_done(stats.slots_done);
    reply.set_slots_failed(stats.slots_failed);
    reply.set_slots_open(stats.slots_open);
    reply.set_connections(stats.connections);
    reply.set_refused(stats.refused);
    reply.set_damaged(stats.damaged);
    reply.set_draining(stats.draining);
    reply.set_uptime_s(stats.uptime_s);
    reply.set_protocol_version(kProtocolVersion);
    reply.set_all_groups(all);
    for (const server::GroupStats& group : stats.groups) {
      v1::GroupStats* one = reply.add_groups();
      one->set_job(group.job);
      one->set_group(group.group);
      one->set_world_size(static_cast<std::uint32_t>(group.world_size));
      one->set_connected(static_cast<std::uint32_t>(group.connected));
      one->set_reserved_bytes(group.reserved_bytes);
    }
    return grpc::Status::OK;
  }

  grpc::Status drain(const std::string& token, v1::DrainReply& reply) {
    const Caller caller = know(token);
    if (caller == Caller::kStranger) return stranger();
    if (caller == Caller::kJob && admin_tokens_) {
      return denied(
          "only a token of this reducer's --admin-token-file drains it; set REDUCER_TOKEN_FILE "
          "(--token-file) to a file with one, or send SIGTERM at its host");
    }
    if (caller == Caller::kJob && tokens_->count() != 1) {
      return denied(
          "this reducer has tokens of several jobs, of which none may end it for the others; send "
          "SIGTERM at its host, or start it with --admin-token-file and use a token of that");
    }
    const std::lock_guard lock(mutex_);
    if (server_ == nullptr) return absent();
    server_->drain();
    reply.set_connections(server_->stats().connections);
    return grpc::Status::OK;
  }

  static std::string tokenOf(const grpc::ServerContext& context) {
    const auto& metadata = context.client_metadata();
    const auto found = metadata.find(kTokenKey);
    if (found == metadata.end()) return {};
    return {found->second.data(), found->second.size()};
  }
  Caller know(const std::string& token) {
    if (!tokens_ && !admin_tokens_) return Caller::kOperator;
    const bool is_operator = admin_tokens_ && admin_tokens_->admits(token);
    const bool is_job = tokens_ && tokens_->admits(token);
    return is_operator ? Caller::kOperator : is_job ? Caller::kJob : Caller::kStranger;
  }
  grpc::Status stranger() const {
    const std::string whose = !tokens_        ? "of its operators"
                              : admin_tokens_ ? "of its jobs or operators"
                                              : "of its jobs";
    return denied("it answers only to who has a token " + whose +
                  "; set REDUCER_TOKEN_FILE (--token-file)");
  }
  static grpc::Status absent() {
    return {grpc::StatusCode::UNAVAILABLE, "the reducer is starting or ending"};
  }

  const std::shared_ptr<server::TokenFile> tokens_;
  const std::shared_ptr<server::TokenFile> admin_tokens_;
  v1::Control::AsyncService service_;
  const Method<v1::StatsRequest, v1::StatsReply> stats_;
  const Method<v1::DrainRequest, v1::DrainReply> drain_;
  std::mutex mutex_;
  server::ReducerServer* server_ = nullptr;
};

}  // namespace

struct Control::Services {
  explicit Services(ControlOptions options)
      : reflects(options.reflects),
        control(calls, std::move(options.tokens), std::move(options.admin_tokens)) {}
  const bool reflects;
  Calls calls;
  ControlService control;
  Health health{calls};
};

Control::Control(ControlOptions options)
    : services_(std::make_unique<Services>(std::move(options))) {}

Control::~Control() = default;

void Control::configure(grpc::ServerBuilder& builder) {
  builder.RegisterService(services_->control.service());
  builder.RegisterService(services_->health.service());
  if (!services_->reflects) {
    builder.SetOption(std::make_unique<WithoutPlugins>());
    return;
  }
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();  // so that it is linked
  // Every thread that waits here also takes events of the data plane: no more than one at rest.
  builder.SetSyncServerOption(grpc::ServerBuilder::NUM_CQS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MIN_POLLERS, 1);
  builder.SetSyncServerOption(grpc::ServerBuilder::MAX_POLLERS, 1);
  grpc::ResourceQuota quota("reducer-reflection");
  quota.SetMaxThreads(kThreadsMax);
  builder.SetResourceQuota(quota);
}

void Control::serve(grpc::ServerCompletionQueue& queue) {
  services_->calls.open(queue);
  services_->control.serve();
  services_->health.serve();
}

void Control::attach(server::ReducerServer& server) {
  services_->control.attach(&server);
  services_->health.set(true);
}

void Control::detach() {
  services_->health.end();
  services_->control.attach(nullptr);
  services_->calls.close();
}

void Control::setServing(bool serving) { services_->health.set(serving); }

}  // namespace reducer::reducerd
