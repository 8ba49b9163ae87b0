#include "transport/grpc/message.h"

#include <memory>
#include <vector>

namespace reducer::transport::grpc_detail {
namespace {

using Owner = std::shared_ptr<const void>;

void release(void* owner) { delete static_cast<Owner*>(owner); }

struct Held {
  std::vector<std::byte> header;
  Owner owner;
};

void releaseHeld(void* held) { delete static_cast<Held*>(held); }

grpc::Slice sliceOf(const Bytes& piece, const Owner& owner) {
  // gRPC's slices have no const; it does not write to those that it sends.
  void* const data = const_cast<std::byte*>(piece.data());
  return grpc::Slice(data, piece.size(), &release, new Owner(owner));
}

}  // namespace

grpc::ByteBuffer toMessage(const wire::Frame& frame, const Payload& payload) {
  const std::vector<std::byte> header = wire::encodeHeader(frame, payload.nbytes());
  if (payload.pieces().empty() && payload.owner()) {
    // Whoever counts what has not been read yet counts this, too.
    auto* const held = new Held{header, payload.owner()};
    const grpc::Slice counted(held->header.data(), held->header.size(), &releaseHeld, held);
    return grpc::ByteBuffer(&counted, 1);
  }
  const grpc::Slice head(header.data(), header.size());
  if (payload.pieces().empty()) return grpc::ByteBuffer(&head, 1);
  if (payload.pieces().size() == 1) {
    const grpc::Slice slices[] = {head, sliceOf(payload.pieces()[0], payload.owner())};
    return grpc::ByteBuffer(slices, 2);
  }
  std::vector<grpc::Slice> slices;
  slices.reserve(1 + payload.pieces().size());
  slices.push_back(head);
  for (const Bytes& piece : payload.pieces()) slices.push_back(sliceOf(piece, payload.owner()));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

Result<wire::Decoded> fromMessage(const grpc::ByteBuffer& message) {
  auto slices = std::make_shared<std::vector<grpc::Slice>>();
  if (!message.Dump(slices.get()).ok()) {
    return Status(Code::kInvalidArgument,
                  "the message is compressed in a way that is not supported");
  }
  std::vector<Bytes> pieces;
  pieces.reserve(slices->size());
  for (const grpc::Slice& slice : *slices) {
    // Data of a short slice lies within the slice object: it stays valid because the vector does
    // not change any more.
    if (slice.size() > 0)
      pieces.emplace_back(reinterpret_cast<const std::byte*>(slice.begin()), slice.size());
  }
  return wire::decode(Payload(std::move(pieces), std::move(slices)));
}

}  // namespace reducer::transport::grpc_detail
