// Bytes that travel: immutable, reference counted, in one or more pieces, never copied on the way.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <utility>
#include <vector>

namespace reducer {

using Bytes = std::span<const std::byte>;

/// Immutable bytes in one or more pieces, kept alive by a shared owner: a tensor being pushed, the
/// slices that gRPC received, or an engine's result. Copying a Payload copies references only.
///
/// Pieces may have any size and alignment, and an element may straddle two of them. Empty pieces
/// are not allowed. Thread safety: as a value; the bytes themselves must not change while a Payload
/// refers to them.
class Payload {
 public:
  Payload() = default;

  /// One contiguous piece. `owner` is released when the last copy of this Payload is gone.
  Payload(Bytes bytes, std::shared_ptr<const void> owner)
      : owner_(std::move(owner)), nbytes_(bytes.size()) {
    if (!bytes.empty()) pieces_.push_back(bytes);
  }

  /// Several pieces, in order.
  Payload(std::vector<Bytes> pieces, std::shared_ptr<const void> owner)
      : owner_(std::move(owner)), pieces_(std::move(pieces)) {
    for (const Bytes& piece : pieces_) nbytes_ += piece.size();
  }

  std::size_t nbytes() const noexcept { return nbytes_; }
  std::span<const Bytes> pieces() const noexcept { return pieces_; }
  const std::shared_ptr<const void>& owner() const noexcept { return owner_; }

  /// Copies all bytes to `out`, which must have room for nbytes().
  void copyTo(std::byte* out) const noexcept;

 private:
  std::shared_ptr<const void> owner_;
  std::vector<Bytes> pieces_;
  std::size_t nbytes_ = 0;
};

}  // namespace reducer
