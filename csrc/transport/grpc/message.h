// Frames to gRPC messages and back, without copying a payload.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include "common/payload.h"
#include "wire/frame.h"

namespace reducer::transport {

/// The header as one slice, then the payload's own memory, which the message keeps alive by its
/// owner.
grpc::ByteBuffer toMessage(const wire::Frame& frame, const Payload& payload);

/// The message's slices as a Payload that owns them.
Payload toPayload(const grpc::ByteBuffer& message);

}  // namespace reducer::transport
