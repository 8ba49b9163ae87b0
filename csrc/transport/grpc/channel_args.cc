#include "transport/grpc/channel_args.h"

#include <absl/synchronization/mutex.h>
#include <grpc/grpc.h>
#include <grpc/support/log.h>

#include <climits>
#include <cstdlib>
#include <utility>

#include "common/limits.h"

namespace reducer::transport::grpc_detail {
namespace {

constexpr int kMiB = 1 << 20;

// For both ends. What is not here was tried and made no difference that could be measured (the size
// of TCP reads), or costs more than it gives: without gRPC's optional filters (the "minimal stack")
// frames are 5% cheaper, but then nothing checks a message's size before it is in memory.
constexpr std::pair<const char*, int> kArguments[] = {
    {GRPC_ARG_MAX_RECEIVE_MESSAGE_LENGTH, static_cast<int>(kMaxMessageBytes)},
    {GRPC_ARG_MAX_SEND_MESSAGE_LENGTH, -1},
    // A reason in words must fit, percent-encoded, into the trailing headers (gRPC's default is 8
    // KiB).
    {GRPC_ARG_MAX_METADATA_SIZE, 32 << 10},
    // A chunk in one HTTP/2 frame instead of one for every 16 KiB: fewer headers, slices and pieces
    // to sum over.
    {GRPC_ARG_HTTP2_MAX_FRAME_SIZE, 4 * kMiB},
    // The stream's window from the first byte. The connection's follows the probes of bandwidth x
    // delay, which are on by default: switched off, gRPC keeps the connection's window at 64 KiB,
    // and a writer waits for a window update for every 64 KiB.
    {GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, 8 * kMiB},
    // The kernel probes idle connections (socket.cc). gRPC's own probe, which servers have by
    // default, puts its timer back at every read.
    {GRPC_ARG_KEEPALIVE_TIME_MS, INT_MAX},
    // Nobody asks for these, and every message would pass through them.
    {GRPC_ARG_ENABLE_CHANNELZ, 0},
    {GRPC_ARG_ENABLE_PER_MESSAGE_COMPRESSION, 0},
    {GRPC_ARG_ENABLE_DEADLINE_CHECKS, 0},
    // Frames that wait are gathered up to this size before they are written (see Stream): a quarter
    // less processor time for frames of 32 and 64 KiB.
    {GRPC_ARG_HTTP2_WRITE_BUFFER_SIZE, kMiB},
};

// What a peer that says nothing, or too much at once, can hold. Connections that carry no call are
// closed, as are those whose handshake lasts too long.
constexpr std::pair<const char*, int> kServerArguments[] = {
    {GRPC_ARG_MAX_CONNECTION_IDLE_MS, 30'000},
    {GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS, 10'000},
    {GRPC_ARG_MAX_CONCURRENT_STREAMS, 16},
};

}  // namespace

grpc::ChannelArguments clientArguments() {
  grpc::ChannelArguments arguments;
  for (const auto& [name, value] : kArguments) arguments.SetInt(name, value);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);  // which would see tokens
  return arguments;
}

void setTlsClientArguments(grpc::ChannelArguments& arguments, const std::string& peer_name) {
  // Each stream has a connection of its own, made once: whoever dials again makes a new channel.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  const bool v6 = peer_name.starts_with('[');
  arguments.SetSslTargetNameOverride(v6 ? peer_name.substr(1, peer_name.size() - 2) : peer_name);
}

void setServerArguments(grpc::ServerBuilder& builder) {
  for (const auto& [name, value] : kServerArguments) builder.AddChannelArgument(name, value);
  for (const auto& [name, value] : kArguments) builder.AddChannelArgument(name, value);
}

void prepareProcess() {
  // Debian builds abseil with its search for deadlocks on: a graph update for every lock that gRPC
  // takes.
  absl::SetMutexDeadlockDetectionMode(absl::OnDeadlockCycle::kIgnore);
  // What gRPC logs about connections reaches the user as a Status from here.
  if (std::getenv("GRPC_VERBOSITY") == nullptr) gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
}

void silenceHandshakes() {
  if (std::getenv("GRPC_VERBOSITY") != nullptr) return;
  gpr_set_log_verbosity(static_cast<gpr_log_severity>(GPR_LOG_SEVERITY_ERROR + 1));
}

}  // namespace reducer::transport::grpc_detail
