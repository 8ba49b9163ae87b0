#include "reducerd/query.h"

#include <google/protobuf/util/json_util.h>
#include <grpcpp/grpcpp.h>

#include <chrono>

#include "reducer.grpc.pb.h"

namespace reducer::reducerd {

Result<std::string> queryStats(const std::string& address) {
  const auto channel = grpc::CreateChannel(address, grpc::InsecureChannelCredentials());
  const auto stub = v1::Control::NewStub(channel);
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  v1::StatsReply reply;
  const grpc::Status status = stub->Stats(&context, v1::StatsRequest(), &reply);
  if (!status.ok()) {
    return Status(Code::kUnavailable,
                  "no reducer answers at " + address + ": " + status.error_message());
  }
  google::protobuf::util::JsonPrintOptions options;
  options.always_print_primitive_fields = true;
  options.preserve_proto_field_names = true;
  std::string json;
  if (!google::protobuf::util::MessageToJsonString(reply, &json, options).ok()) {
    return Status(Code::kInternal, "the reply of " + address + " cannot be printed");
  }
  return json;
}

}  // namespace reducer::reducerd
