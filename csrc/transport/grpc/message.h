// Frames to gRPC's byte buffers and back, without copying a payload.
#pragma once

#include <grpcpp/support/byte_buffer.h>

#include "common/payload.h"
#include "common/status.h"
#include "wire/frame.h"

namespace reducer::transport::grpc_detail {

/// The buffer refers to the payload's own memory and keeps its owner.
grpc::ByteBuffer toMessage(const wire::Frame& frame, const Payload& payload);

/// The payload refers to the buffer's slices and keeps them. As wire::decode.
Result<wire::Decoded> fromMessage(const grpc::ByteBuffer& message);

}  // namespace reducer::transport::grpc_detail
