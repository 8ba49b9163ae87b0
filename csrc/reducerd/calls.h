// Calls of the control plane: asynchronous ones, so that none holds a thread, however long its
// client takes to read the answer. The data plane's threads answer them.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <mutex>

#include "transport/grpc/factory.h"

namespace reducer::reducerd {

inline void* tagOf(transport::GrpcTag& tag) { return &tag; }

/// Where calls are waited for. Thread safe.
class Calls {
 public:
  void open(grpc::ServerCompletionQueue& queue) {
    const std::lock_guard lock(mutex_);
    queue_ = &queue;
  }
  /// No more: the queue may end.
  void close() {
    const std::lock_guard lock(mutex_);
    queue_ = nullptr;
  }
  /// `wait(queue)` asks gRPC for a call; it is not called after close().
  template <class Wait>
  void next(const Wait& wait) {
    const std::lock_guard lock(mutex_);
    if (queue_ != nullptr) wait(queue_);
  }

 private:
  std::mutex mutex_;
  grpc::ServerCompletionQueue* queue_ = nullptr;
};

/// A method with one request and one reply.
template <class Request, class Reply>
struct Method {
  Calls& calls;
  std::function<void(grpc::ServerContext*, Request*, grpc::ServerAsyncResponseWriter<Reply>*,
                     grpc::ServerCompletionQueue*, void* tag)>
      ask;
  std::function<grpc::Status(const grpc::ServerContext&, const Request&, Reply&)> answer;
};

/// One call of it; ends by itself.
template <class Request, class Reply>
class Call final : public transport::GrpcTag {
 public:
  /// Waits for the next one. `method` is there until the queue has ended.
  static void next(const Method<Request, Reply>& method) {
    method.calls.next([&method](grpc::ServerCompletionQueue* queue) {
      Call* const call = new Call(method);
      method.ask(&call->context_, &call->request_, &call->writer_, queue, tagOf(*call));
    });
  }

  void complete(bool ok) override {
    std::unique_ptr<Call> self(this);
    if (answered_ || !ok) return;
    next(method_);
    answered_ = true;
    Reply reply;
    const grpc::Status status = method_.answer(context_, request_, reply);
    if (status.ok()) {
      writer_.Finish(reply, status, tagOf(*this));
    } else {
      writer_.FinishWithError(status, tagOf(*this));
    }
    (void)self.release();
  }

 private:
  explicit Call(const Method<Request, Reply>& method) : method_(method) {}

  const Method<Request, Reply>& method_;
  grpc::ServerContext context_;
  Request request_;
  grpc::ServerAsyncResponseWriter<Reply> writer_{&context_};
  bool answered_ = false;
};

}  // namespace reducer::reducerd
