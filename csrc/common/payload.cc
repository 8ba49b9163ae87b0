#include "common/payload.h"

#include <cstring>

namespace reducer {

void Payload::copyTo(std::byte* out) const noexcept {
  for (const Bytes& piece : pieces_) {
    std::memcpy(out, piece.data(), piece.size());
    out += piece.size();
  }
}

}  // namespace reducer
