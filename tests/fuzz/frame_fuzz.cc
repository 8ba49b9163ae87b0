// Any bytes: the parser must neither crash nor read beyond them, must not mind where the pieces are
// cut, and what it accepts must come back the same when it is written and read again.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "common/limits.h"
#include "wire/frame.h"

namespace {

using reducer::Bytes;
using reducer::Payload;
using reducer::wire::Decoded;
using reducer::wire::Frame;

void require(bool condition) {
  if (!condition) std::abort();
}

/// Each piece in memory of exactly its size, so that a step over its end is seen.
Payload inPieces(Bytes bytes, std::size_t cut) {
  auto owner = std::make_shared<std::vector<std::vector<std::byte>>>();
  for (const Bytes part : {bytes.first(cut), bytes.subspan(cut)}) {
    if (!part.empty()) owner->emplace_back(part.begin(), part.end());
  }
  std::vector<Bytes> pieces(owner->begin(), owner->end());
  return Payload(std::move(pieces), std::move(owner));
}

std::vector<std::byte> copyOf(const Payload& payload) {
  std::vector<std::byte> bytes(payload.nbytes());
  payload.copyTo(bytes.data());
  return bytes;
}

void comesBackTheSame(const Decoded& decoded) {
  const std::vector<std::byte> payload = copyOf(decoded.payload);
  std::vector<std::byte> message = reducer::wire::encodeHeader(decoded.frame, payload.size());
  message.insert(message.end(), payload.begin(), payload.end());
  auto again = reducer::wire::decode(inPieces(message, 0));
  require(again.ok());
  require(again.value().frame == decoded.frame);
  require(copyOf(again.value().payload) == payload);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const Bytes bytes(reinterpret_cast<const std::byte*>(data), size);
  auto whole = reducer::wire::decode(inPieces(bytes, 0));
  // The cut depends on the input only, so that a finding can be replayed.
  const std::size_t cut = size == 0 ? 0 : (data[size - 1] + 7 * size) % size;
  auto cut_up = reducer::wire::decode(inPieces(bytes, cut));
  require(whole.ok() == cut_up.ok());
  if (!whole.ok()) {
    require(whole.status().message() == cut_up.status().message());
    return 0;
  }
  const Decoded& decoded = whole.value();
  require(decoded.frame == cut_up.value().frame);
  require(copyOf(decoded.payload) == copyOf(cut_up.value().payload));
  // Of a hello of another version nothing but the version is promised.
  const bool foreign = decoded.frame.kind == reducer::wire::FrameKind::kHello &&
                       decoded.frame.hello.version != reducer::kProtocolVersion;
  if (!foreign) comesBackTheSame(decoded);
  return 0;
}
