#include "reducerd/query.h"

#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>
#include <poll.h>
#include <sys/socket.h>

#include <chrono>
#include <string_view>

#include "reducer.grpc.pb.h"
#include "reducerd/control.h"
#include "server/tokens.h"
#include "transport/grpc/channel_args.h"
#include "transport/grpc/tls.h"
#include "transport/net/dialer.h"

namespace reducer::reducerd {
namespace {

namespace net = transport::net;

constexpr std::chrono::milliseconds kPatience{2000};

bool waitFor(const net::Fd& fd, short events) {
  pollfd polled{fd.get(), events, 0};
  return ::poll(&polled, 1, static_cast<int>(kPatience.count())) > 0;
}

/// What a connection of our own finds out that gRPC does not tell: TLS that is wrong, or here or
/// there only. Ok: nothing.
Status explain(const std::string& address, const transport::TlsFiles& tls) {
  auto resolved = net::resolve(address);
  if (!resolved.ok()) return {};
  auto started = net::startConnect(resolved.value().front(), "system");
  if (!started.ok()) return {};
  net::Fd fd = std::move(started).value();
  if (!waitFor(fd, POLLOUT) || !net::connectError(fd.get()).empty()) return {};
  if (tls.on()) {
    return transport::grpc_detail::tryHandshake(std::move(fd), address, tls, kPatience);
  }
  char answer[net::kGreetingBytes];
  const bool told =
      ::send(fd.get(), net::kGreeting.data(), net::kGreetingBytes, MSG_NOSIGNAL) > 0 &&
      waitFor(fd, POLLIN) &&
      ::recv(fd.get(), answer, sizeof answer, 0) == static_cast<ssize_t>(sizeof answer) &&
      std::string_view(answer, sizeof answer) == net::kTlsOnly;
  return told ? net::tlsWanted(address) : Status();
}

}  // namespace

Result<std::string> queryStats(const Options& options) {
  const std::string& address = options.stats_of;
  grpc::ClientContext context;
  if (!options.token_file.empty()) {
    auto tokens = server::TokenFile::open(options.token_file);
    if (!tokens.ok()) return tokens.status();
    context.AddMetadata(kTokenKey, tokens.value()->any());
  }
  if (Status status = transport::checkTls(options.tls, transport::TlsRole::kClient); !status.ok())
    return status;
  transport::grpc_detail::silenceHandshakes();
  const auto channel = grpc::CreateCustomChannel(
      address,
      options.tls.on() ? transport::grpc_detail::channelCredentials(options.tls)
                       : grpc::InsecureChannelCredentials(),
      transport::grpc_detail::clientArguments());
  const auto stub = v1::Control::NewStub(channel);
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  v1::StatsReply reply;
  const grpc::Status status = stub->Stats(&context, v1::StatsRequest(), &reply);
  if (status.error_code() == grpc::StatusCode::PERMISSION_DENIED) {
    return Status(Code::kInvalidArgument, address + ": " + status.error_message());
  }
  if (!status.ok()) {
    if (Status why = explain(address, options.tls); !why.ok()) return why;
    return Status(Code::kUnavailable,
                  "no reducer answers at " + address + ": " + status.error_message());
  }
  google::protobuf::util::JsonPrintOptions print;
  print.always_print_primitive_fields = true;
  print.preserve_proto_field_names = true;
  std::string json;
  if (!google::protobuf::util::MessageToJsonString(reply, &json, print).ok()) {
    return Status(Code::kInternal, "the reply of " + address + " cannot be printed");
  }
  return json;
}

}  // namespace reducer::reducerd
