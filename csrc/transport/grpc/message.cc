#include "transport/grpc/message.h"

#include <grpcpp/support/slice.h>

#include <vector>

namespace reducer::transport {
namespace {

// Up to this size a copy behind the header costs less than one more slice on both sides.
constexpr std::size_t kInlineBytes = 512;

grpc::Slice borrow(Bytes piece, const std::shared_ptr<const void>& owner) {
  auto* hold = new std::shared_ptr<const void>(owner);
  return grpc::Slice(
      const_cast<std::byte*>(piece.data()), piece.size(),
      [](void* held) { delete static_cast<std::shared_ptr<const void>*>(held); }, hold);
}

}  // namespace

grpc::ByteBuffer toMessage(const wire::Frame& frame, const Payload& payload) {
  std::vector<std::byte> header = wire::encodeHeader(frame, payload.nbytes());
  if (payload.nbytes() <= kInlineBytes) {
    const std::size_t at = header.size();
    header.resize(at + payload.nbytes());
    payload.copyTo(header.data() + at);
    const grpc::Slice slice(header.data(), header.size());
    return grpc::ByteBuffer(&slice, 1);
  }
  std::vector<grpc::Slice> slices;
  slices.reserve(1 + payload.pieces().size());
  slices.emplace_back(header.data(), header.size());
  for (const Bytes& piece : payload.pieces()) slices.push_back(borrow(piece, payload.owner()));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

Payload toPayload(const grpc::ByteBuffer& message) {
  auto slices = std::make_shared<std::vector<grpc::Slice>>();
  if (!message.Dump(slices.get()).ok()) return {};
  std::vector<Bytes> pieces;
  pieces.reserve(slices->size());
  for (const grpc::Slice& slice : *slices) {
    if (slice.size() > 0)
      pieces.emplace_back(reinterpret_cast<const std::byte*>(slice.begin()), slice.size());
  }
  return {std::move(pieces), std::move(slices)};
}

}  // namespace reducer::transport
