#include "reducerd/health.h"

#include <string>
#include <utility>

#include "transport/grpc/peer.h"

namespace reducer::reducerd {
namespace {

bool known(const std::string& service) { return service.empty() || service == "reducer.v1.Data"; }

grpc::Status unknown(const std::string& service) {
  return {grpc::StatusCode::NOT_FOUND, "no service '" + service + "' here"};
}

grpc::Status crowded() {
  return {grpc::StatusCode::RESOURCE_EXHAUSTED,
          "this reducer is watched by as many as it bears (" + std::to_string(Health::kWatchesMax) +
              " in all, " + std::to_string(Health::kWatchesOfOneMax) +
              " of one address); use Check, or try again"};
}

}  // namespace

/// One call of Watch; ends by itself. What gRPC has not done yet is counted in pending_: when that
/// falls to 0 the call is over.
class Health::Watch final {
 public:
  static void next(Health& health) {
    health.calls_.next([&health](grpc::ServerCompletionQueue* queue) {
      Watch* const watch = new Watch(health);
      watch->context_.AsyncNotifyWhenDone(tagOf(watch->done_));
      health.service_.RequestWatch(&watch->context_, &watch->request_, &watch->writer_, queue,
                                   queue, tagOf(watch->start_));
    });
  }

  /// Says what has changed. Called with the lock held.
  void tell() {
    if (busy_ || finished_) return;
    if (health_.status() != told_) {
      told_ = health_.status();
      reply_.set_status(told_);
      busy_ = true;
      ++pending_;
      writer_.Write(reply_, tagOf(write_));
    } else if (health_.ended_) {
      finish({grpc::StatusCode::UNAVAILABLE, "the reducer is ending"});
    }
  }

 private:
  struct Tag final : transport::GrpcTag {
    Tag(Watch& w, void (Watch::*c)(bool)) : watch(w), call(c) {}
    void complete(bool ok) override { watch.completed(call, ok); }
    Watch& watch;
    void (Watch::*const call)(bool);
  };

  explicit Watch(Health& health) : health_(health) {}

  void completed(void (Watch::*call)(bool), bool ok) {
    std::unique_ptr<Watch> over;  // is let go without the lock
    const std::lock_guard lock(health_.mutex_);
    (this->*call)(ok);
    if (--pending_ > 0) return;
    health_.watches_.erase(this);
    over.reset(this);
  }

  void onStart(bool ok) {
    if (!ok) return;  // nobody called; then gRPC does not tell of the end, either
    next(health_);
    ++pending_;
    place_ = health_.places_->enter(transport::grpc_detail::callerOf(context_));
    if (!place_) return finish(crowded());
    if (!known(request_.service())) {
      reply_.set_status(Reply::SERVICE_UNKNOWN);
      ++pending_;
      finished_ = true;
      writer_.WriteAndFinish(reply_, {}, unknown(request_.service()), tagOf(write_));
      return;
    }
    health_.watches_.insert(this);
    tell();
  }

  void onWritten(bool ok) {
    busy_ = false;
    if (ok) tell();
  }

  void onDone(bool /*ok*/) {
    finished_ = true;
    place_ = nullptr;
  }

  void finish(const grpc::Status& status) {
    finished_ = true;
    ++pending_;
    writer_.Finish(status, tagOf(write_));
  }

  Health& health_;
  grpc::ServerContext context_;
  Request request_;
  Reply reply_;
  grpc::ServerAsyncWriter<Reply> writer_{&context_};
  std::shared_ptr<transport::net::Guest> place_;
  Reply::ServingStatus told_ = Reply::UNKNOWN;
  int pending_ = 1;  // the start
  bool busy_ = false;
  bool finished_ = false;
  Tag start_{*this, &Watch::onStart};
  Tag write_{*this, &Watch::onWritten};
  Tag done_{*this, &Watch::onDone};
};

Health::Health(Calls& calls)
    : calls_(calls),
      check_{calls,
             [this](auto* context, auto* request, auto* writer, auto* queue, void* tag) {
               service_.RequestCheck(context, request, writer, queue, queue, tag);
             },
             [this](const auto&, const Request& request, Reply& reply) {
               if (!known(request.service())) return unknown(request.service());
               const std::lock_guard lock(mutex_);
               reply.set_status(status());
               return grpc::Status::OK;
             }} {}

void Health::serve() {
  Call<Request, Reply>::next(check_);
  Watch::next(*this);
}

void Health::set(bool serving) {
  const std::lock_guard lock(mutex_);
  serving_ = serving && !ended_;
  tellAll();
}

void Health::end() {
  const std::lock_guard lock(mutex_);
  serving_ = false;
  ended_ = true;
  tellAll();
}

void Health::tellAll() {
  for (Watch* const watch : watches_) watch->tell();
}

}  // namespace reducer::reducerd
