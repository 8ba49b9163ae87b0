#include "reducerd/query.h"

#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>

#include <chrono>

#include "reducer.grpc.pb.h"
#include "reducerd/control.h"
#include "server/tokens.h"
#include "transport/grpc/channel_args.h"
#include "transport/grpc/tls.h"

namespace reducer::reducerd {

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
    if (Status why = transport::grpc_detail::explain(address, options.tls); !why.ok()) return why;
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
