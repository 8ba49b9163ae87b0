#include "transport/grpc/reason.h"

#include <charconv>

#include "wire/utf8.h"

namespace reducer::transport::grpc_detail {
namespace {

constexpr char kCodeKey[] = "reducer-code";

// A message travels in a header, percent-encoded; longer ones would be dropped by a peer's limit on
// headers.
constexpr std::size_t kReasonBytesMax = 2048;

/// The nearest of gRPC's codes, for other clients.
grpc::StatusCode nearestCode(Code code) {
  switch (code) {
    case Code::kOk:
      return grpc::StatusCode::OK;
    case Code::kInvalidArgument:
      return grpc::StatusCode::INVALID_ARGUMENT;
    case Code::kMismatch:
    case Code::kVersion:
      return grpc::StatusCode::FAILED_PRECONDITION;
    case Code::kTimeout:
      return grpc::StatusCode::DEADLINE_EXCEEDED;
    case Code::kUnavailable:
      return grpc::StatusCode::UNAVAILABLE;
    case Code::kResourceExhausted:
      return grpc::StatusCode::RESOURCE_EXHAUSTED;
    case Code::kAborted:
      return grpc::StatusCode::ABORTED;
    case Code::kInternal:
      return grpc::StatusCode::INTERNAL;
  }
  return grpc::StatusCode::UNKNOWN;
}

}  // namespace

grpc::Status toGrpc(const Status& reason, grpc::ServerContext& context) {
  context.AddTrailingMetadata(kCodeKey, std::to_string(static_cast<int>(reason.code())));
  return grpc::Status(nearestCode(reason.code()), wire::toUtf8(reason.message(), kReasonBytesMax));
}

bool isFromReducer(const grpc::ClientContext& context) {
  return context.GetServerTrailingMetadata().count(kCodeKey) != 0;
}

std::string textOf(const grpc::Status& status) {
  return wire::withoutControls(status.error_message());
}

Status fromGrpc(const grpc::Status& status, const grpc::ClientContext& context,
                const std::string& peer) {
  const auto& trailers = context.GetServerTrailingMetadata();
  if (const auto found = trailers.find(kCodeKey); found != trailers.end()) {
    int code = -1;
    std::from_chars(found->second.begin(), found->second.end(), code);
    if (code == static_cast<int>(Code::kOk)) return {};
    if (code > 0 && code <= static_cast<int>(Code::kInternal)) {
      return Status(static_cast<Code>(code), textOf(status));
    }
  }
  switch (status.error_code()) {
    case grpc::StatusCode::OK:
      return {};
    case grpc::StatusCode::UNAVAILABLE:
      return Status(Code::kUnavailable,
                    "the connection to " + peer + " was lost: " + textOf(status));
    case grpc::StatusCode::CANCELLED:
      return Status(Code::kUnavailable, peer + " ended the connection");
    case grpc::StatusCode::RESOURCE_EXHAUSTED:
      return Status(Code::kResourceExhausted, peer + ": " + textOf(status));
    default:
      return Status(Code::kUnavailable, "the stream to " + peer + " broke (gRPC status " +
                                            std::to_string(status.error_code()) +
                                            "): " + textOf(status));
  }
}

}  // namespace reducer::transport::grpc_detail
