// What has been received and not yet taken: bytes in blocks, frames out of them.
//
// A message on the wire is its header's and its payload's size (4 bytes each, little-endian), the
// header, the payload: both as wire/frame.h makes them. A header of 0 bytes is the last message of
// an end that closes: its payload is a Code (one byte) and a text, the reason.
#pragma once

#include <sys/uio.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "common/payload.h"
#include "common/status.h"

namespace reducer::transport::tcp {

inline constexpr std::size_t kPrefixBytes = 8;

/// One call receives up to this much, and as many frames as that holds; a payload that does not fit
/// goes on in the next block.
inline constexpr std::size_t kBlockBytes = std::size_t{128} << 10;

struct Block {
  std::byte bytes[kBlockBytes];
};

/// Blocks that are used again and again. Thread safe; a block returns when nothing refers to it.
class BlockPool {
 public:
  BlockPool() : state_(std::make_shared<State>()) {}
  std::shared_ptr<Block> get();
  /// Bytes of those that somebody refers to.
  std::size_t lentBytes() const { return state_->lent * kBlockBytes; }

 private:
  struct State {
    ~State();
    std::atomic<std::size_t> lent{0};
    std::mutex mutex;
    std::vector<Block*> free;
  };
  const std::shared_ptr<State> state_;
};

/// Not thread safe. What a peer can make it hold: one message, and the blocks that payloads handed
/// out refer to, of which they fill an eighth at the least.
class Inbox {
 public:
  explicit Inbox(BlockPool& pool) : pool_(pool) {}

  static constexpr int kPiecesMax = 16;
  /// Where the next bytes go: fills up to kPiecesMax pieces, returns how many. As much as the
  /// message under way lacks, and more where there is room.
  int space(iovec* pieces);
  void received(std::size_t nbytes) { nbytes_ += nbytes; }

  /// No message may have more. From any thread.
  void limit(std::size_t nbytes) { limit_ = nbytes; }

  enum class Next { kMore, kFrame, kGoodbye, kBad };
  /// Takes the next message out. kFrame: `message` is header and payload, as wire::decode wants
  /// them. kGoodbye: `message` is code and text. kBad: its sizes are beyond the limits, in words;
  /// nothing that follows can be understood. kMore: it has not come as a whole.
  Next next(Payload& message, std::string& bad);

 private:
  std::size_t wanted() const { return message_nbytes_ == 0 ? kPrefixBytes : message_nbytes_; }
  std::byte at(std::size_t offset) const;
  Payload slice(std::size_t offset, std::size_t nbytes) const;
  void consume(std::size_t nbytes, bool handed_out);

  BlockPool& pool_;
  std::atomic<std::size_t> limit_{SIZE_MAX};
  std::deque<std::shared_ptr<Block>> blocks_;
  std::size_t head_ = 0;            // in the first block: where the unread bytes begin
  std::size_t nbytes_ = 0;          // unread
  std::size_t message_nbytes_ = 0;  // of the message under way, with its prefix; 0: not known yet
  bool lent_ = false;               // a payload refers to the first block
};

}  // namespace reducer::transport::tcp
