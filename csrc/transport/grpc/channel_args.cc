#include "transport/grpc/channel_args.h"

#include <utility>

#include "common/limits.h"

namespace reducer::transport {
namespace {

constexpr int kMiB = 1 << 20;

// For both ends.
constexpr std::pair<const char*, int> kCommon[] = {
    {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, static_cast<int>(kMaxMessageBytes)},
    {GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, static_cast<int>(kMaxMessageBytes)},
    // A chunk in one HTTP/2 frame instead of one for every 16 KiB: less headers, less slices, less
    // parsing.
    {GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 4 * kMiB},
    // The window of links bounds what is outstanding; HTTP/2's own window must not be a smaller
    // one.
    {GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 8 * kMiB},
    // With that window there is nothing to probe for, and a probe is a ping for every few reads.
    {GRPC_ARG_HTTP2_BDP_PROBE, 0},
    // None of the optional filters (census, deadlines, message compression ...) is used.
    {GRPC_ARG_MINIMAL_STACK, 1},
    // Reads in pieces of this size: few slices per chunk.
    {GRPC_ARG_TCP_READ_CHUNK_SIZE, 256 << 10},
    {"grpc.experimental.tcp_max_read_chunk_size", 4 * kMiB},
};

}  // namespace

void configure(grpc::ChannelArguments& arguments) {
  for (const auto& [name, value] : kCommon) arguments.SetInt(name, value);
  // A retry filter would keep the tensor's slices after they were sent.
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // Every connection is a TCP connection of its own, also to the same address.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  // The other end may start later: look again soon.
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 500);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 500);
  // A cluster's hosts talk to each other directly.
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
}

void configure(grpc::ServerBuilder& builder) {
  for (const auto& [name, value] : kCommon) builder.AddChannelArgument(name, value);
  // A port in use is an error, not half of the connections.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
}

}  // namespace reducer::transport
