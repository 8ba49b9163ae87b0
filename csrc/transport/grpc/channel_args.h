// Settings of gRPC that matter here, each with its reason.
#pragma once

#include <grpcpp/server_builder.h>
#include <grpcpp/support/channel_arguments.h>

#include <string>

namespace reducer::transport::grpc_detail {

grpc::ChannelArguments clientArguments();
/// `peer_name`: whose certificate the other end has to show.
void setTlsClientArguments(grpc::ChannelArguments& arguments, const std::string& peer_name);
void setServerArguments(grpc::ServerBuilder& builder);

/// Settings of the whole process: what gRPC logs, how its locks behave.
void prepareProcess();
/// With TLS: strangers must not fill a log with lines about their handshakes, and what is wrong
/// with one's own is told as a Status. GRPC_VERBOSITY=error shows them.
void silenceHandshakes();

}  // namespace reducer::transport::grpc_detail
