#include "transport/tcp/inbox.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>

#include "common/limits.h"
#include "transport/message_limit.h"
#include "wire/fields.h"

namespace reducer::transport::tcp {
namespace {

// Free blocks that are kept: what a steady stream of chunks needs.
constexpr std::size_t kKeptBytes = std::size_t{4} << 20;

// There is always room for so much: fewer, larger calls.
constexpr std::size_t kRoomBytesMin = kBlockBytes / 2;

// What is received beyond the message under way is bounded, so that one call does not take long.
constexpr std::size_t kRoomBytesMax = std::size_t{1} << 20;

}  // namespace

BlockPool::State::~State() {
  for (Block* block : free) delete block;
}

std::shared_ptr<Block> BlockPool::get() {
  Block* block = nullptr;
  {
    const std::lock_guard lock(state_->mutex);
    if (!state_->free.empty()) {
      block = state_->free.back();
      state_->free.pop_back();
    }
  }
  if (block == nullptr) block = new Block;
  ++state_->lent;
  return {block, [state = state_](Block* done) {
            --state->lent;
            {
              const std::lock_guard lock(state->mutex);
              if (state->free.size() < kKeptBytes / kBlockBytes) {
                state->free.push_back(done);
                return;
              }
            }
            delete done;
          }};
}

int Inbox::space(iovec* pieces) {
  const std::size_t lacking = wanted() > nbytes_ ? wanted() - nbytes_ : 0;
  const std::size_t room = std::clamp(lacking, kRoomBytesMin, kRoomBytesMax);
  std::size_t end = head_ + nbytes_;
  while (blocks_.size() * kBlockBytes < end + room) blocks_.push_back(pool_.get());
  int count = 0;
  for (; count < kPiecesMax && end < blocks_.size() * kBlockBytes; ++count) {
    const std::size_t offset = end % kBlockBytes;
    pieces[count] = {blocks_[end / kBlockBytes]->bytes + offset, kBlockBytes - offset};
    end += kBlockBytes - offset;
  }
  return count;
}

std::byte Inbox::at(std::size_t offset) const {
  const std::size_t place = head_ + offset;
  return blocks_[place / kBlockBytes]->bytes[place % kBlockBytes];
}

Payload Inbox::slice(std::size_t offset, std::size_t nbytes) const {
  std::size_t place = head_ + offset;
  const std::size_t end = place + nbytes;
  const std::size_t first = place / kBlockBytes;
  if (end <= (first + 1) * kBlockBytes) {
    const std::shared_ptr<Block>& block = blocks_[first];
    return Payload(Bytes(block->bytes + place % kBlockBytes, nbytes), block);
  }
  auto owners = std::make_shared<std::vector<std::shared_ptr<Block>>>();
  std::vector<Bytes> pieces;
  while (place < end) {
    const std::shared_ptr<Block>& block = blocks_[place / kBlockBytes];
    const std::size_t begin = place % kBlockBytes;
    const std::size_t length = std::min(kBlockBytes - begin, end - place);
    pieces.emplace_back(block->bytes + begin, length);
    owners->push_back(block);
    place += length;
  }
  return Payload(std::move(pieces), std::move(owners));
}

Inbox::Next Inbox::next(Payload& message, std::string& bad) {
  if (nbytes_ < kPrefixBytes) return Next::kMore;
  std::uint32_t sizes[2] = {};
  for (std::size_t i = 0; i < kPrefixBytes; ++i) {
    sizes[i / 4] |= std::to_integer<std::uint32_t>(at(i)) << (8 * (i % 4));
  }
  const auto [header, payload] = sizes;
  const bool goodbye = header == 0;
  const std::size_t payload_max = goodbye ? 1 + kMaxTextBytes : kMaxChunkBytes;
  if (header > wire::kMaxHeaderBytes || payload > payload_max || (goodbye && payload == 0)) {
    bad = "a message with a header of " + std::to_string(header) + " and a payload of " +
          std::to_string(payload) + " bytes; the limits are " +
          std::to_string(wire::kMaxHeaderBytes) + " and " + std::to_string(payload_max);
    return Next::kBad;
  }
  if (std::size_t{header} + payload > limit_) {
    bad = tooLong(std::size_t{header} + payload, limit_);
    return Next::kBad;
  }
  message_nbytes_ = kPrefixBytes + header + payload;
  if (nbytes_ < message_nbytes_) return Next::kMore;
  message = slice(kPrefixBytes, header + payload);
  consume(std::exchange(message_nbytes_, 0), payload > 0);
  return goodbye ? Next::kGoodbye : Next::kFrame;
}

void Inbox::consume(std::size_t nbytes, bool handed_out) {
  head_ += nbytes;
  nbytes_ -= nbytes;
  lent_ = handed_out || (lent_ && head_ <= kBlockBytes);
  while (head_ >= kBlockBytes) {
    blocks_.pop_front();
    head_ -= kBlockBytes;
  }
  // Nothing waits: the block goes back, to be taken again while it is warm in the cache. But one
  // that a small payload holds is filled further, or many small payloads would hold many blocks.
  if (nbytes_ == 0 && (!lent_ || head_ >= kBlockBytes / 8 || head_ == 0)) {
    blocks_.clear();
    head_ = 0;
    lent_ = false;
  }
}

}  // namespace reducer::transport::tcp
