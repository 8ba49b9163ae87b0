#include "transport/grpc/channel_args.h"

#include <grpc/grpc.h>
#include <grpc/support/log.h>

#include <cstdlib>

#include "common/limits.h"

namespace reducer::transport::grpc_detail {
namespace {

int env(const char* n, int d) { const char* v = getenv(n); return v ? atoi(v) : d; }

template <class Set>
void common(Set set) {
  set(GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, static_cast<int>(kMaxMessageBytes));
  set(GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1);
  set(GRPC_ARG_MAX_METADATA_SIZE, 32 << 10);
  if (int v = env("X_FRAME", 0)) set(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, v);
  if (int v = env("X_LOOKAHEAD", 0)) set(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, v);
  if (int v = env("X_WBUF", 0)) set(GRPC_ARG_HTTP2_WRITE_BUFFER_SIZE, v);
  set(GRPC_ARG_HTTP2_BDP_PROBE, env("X_BDP", 1));
  if (int v = env("X_CHUNK", 0)) set("grpc.experimental.tcp_read_chunk_size", v);
  if (int v = env("X_MINCHUNK", 0)) set("grpc.experimental.tcp_min_read_chunk_size", v);
  if (int v = env("X_MAXCHUNK", 0)) set("grpc.experimental.tcp_max_read_chunk_size", v);
  if (int v = env("X_MINIMAL", 0)) set(GRPC_ARG_MINIMAL_STACK, v);
  if (env("X_THROUGHPUT", 0)) set("grpc.optimization_target_int", 0);
}

}  // namespace

grpc::ChannelArguments clientArguments() {
  grpc::ChannelArguments arguments;
  common([&](const char* name, int value) { arguments.SetInt(name, value); });
  return arguments;
}

void setServerArguments(grpc::ServerBuilder& builder) {
  common([&](const char* name, int value) { builder.AddChannelArgument(name, value); });
}

void quietGrpcLog() {
  if (std::getenv("GRPC_VERBOSITY") == nullptr) gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
}

}  // namespace reducer::transport::grpc_detail
