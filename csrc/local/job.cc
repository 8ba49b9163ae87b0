#include "local/job.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "kernels/reduce.h"

namespace reducer::local {
namespace {

// Shares and pieces begin at lines of their own, and so at whole elements.
constexpr std::size_t kAlign = 64;

// In one hop every rank reads all that all have published: of sums no more than this, or the time
// would grow with the square of the number of ranks where they share cores.
constexpr std::size_t kHopReads = std::size_t{256} << 10;

const std::byte* raw(const void* data) { return static_cast<const std::byte*>(data); }
std::byte* raw(void* data) { return static_cast<std::byte*>(data); }

void copyBytes(std::byte* to, const std::byte* from, std::size_t nbytes) {
  if (nbytes > 0 && to != from) std::memcpy(to, from, nbytes);
}

std::uint64_t divideUp(std::size_t nbytes, std::size_t by) { return (nbytes + by - 1) / by; }

/// The part of `all` bytes that lies in [begin, begin + most).
std::size_t left(std::size_t all, std::size_t begin, std::size_t most) {
  return begin >= all ? 0 : std::min(most, all - begin);
}

std::uint64_t numberAt(const std::byte* table, std::size_t index) {
  std::uint64_t number;
  std::memcpy(&number, table + index * sizeof number, sizeof number);
  return number;
}

}  // namespace

// ------------------------------------------------------------------ all-reduce, reduce

SumJob::SumJob(Seat seat, DataType dtype, ReduceOp op, const void* in, void* out, std::size_t count)
    : seat_(seat),
      dtype_(dtype),
      op_(op),
      in_(raw(in)),
      out_(raw(out)),
      nbytes_(count * sizeOf(dtype)),
      sources_(seat.size) {}

void SumJob::publish(std::byte* slot) const { copyBytes(slot, in_, nbytes_); }

void SumJob::collect(Views slots) {
  if (out_ == nullptr || nbytes_ == 0) return;
  kernels::reduce(dtype_, op_, slots, out_, nbytes_ / sizeOf(dtype_));
}

std::size_t SumJob::hopBytesMax(std::size_t slot_bytes) const {
  return std::min(slot_bytes, kHopReads / seat_.size);
}

std::uint64_t SumJob::rounds(std::size_t stage_bytes) {
  // Of several rounds none should be much shorter than the others.
  const std::uint64_t rounds = std::max<std::uint64_t>(1, divideUp(nbytes_, stage_bytes));
  const std::size_t even = divideUp(nbytes_, rounds);
  share_ = std::max<std::size_t>(1, divideUp(divideUp(even, seat_.size), kAlign)) * kAlign;
  // A stage that is no multiple of the places' lines has no room for the last one's whole share.
  share_ = std::min(share_, stage_bytes / seat_.size / kAlign * kAlign);
  chunk_ = share_ * seat_.size;
  return divideUp(nbytes_, chunk_);
}

std::size_t SumJob::chunkBytes(std::uint64_t round) const {
  return left(nbytes_, round * chunk_, chunk_);
}

// Shares lie at the same place in every round: the results of one are still read when the next but
// one is filled in around them.
SumJob::Share SumJob::shareOf(std::uint32_t place, std::size_t chunk_bytes) const {
  const std::size_t begin = std::min(chunk_bytes, place * share_);
  return {begin, std::min(share_, chunk_bytes - begin)};
}

void SumJob::fill(std::uint64_t round, std::byte* stage) {
  const std::size_t nbytes = chunkBytes(round);
  const std::byte* const in = in_ + round * chunk_;
  const Share own = shareOf(seat_.place, nbytes);
  copyBytes(stage, in, own.begin);
  const std::size_t behind = own.begin + own.nbytes;
  copyBytes(stage + behind, in + behind, nbytes - behind);
}

void SumJob::use(std::uint64_t round, Views stages, std::byte* own) {
  const Share share = shareOf(seat_.place, chunkBytes(round));
  if (share.nbytes == 0) return;
  for (std::uint32_t p = 0; p < seat_.size; ++p) sources_[p] = stages[p] + share.begin;
  sources_[seat_.place] = in_ + round * chunk_ + share.begin;
  // Where nobody has put anything: the others' sums have this share from others.
  std::byte* const sum = own + share.begin;
  kernels::reduce(dtype_, op_, sources_, sum, share.nbytes / sizeOf(dtype_));
  if (out_ != nullptr) copyBytes(out_ + round * chunk_ + share.begin, sum, share.nbytes);
}

void SumJob::finish(std::uint64_t round, Views stages) {
  if (out_ == nullptr) return;
  const std::size_t nbytes = chunkBytes(round);
  // Everybody begins with another one's share.
  for (std::uint32_t i = 1; i < seat_.size; ++i) {
    const std::uint32_t p = (seat_.place + i) % seat_.size;
    const Share share = shareOf(p, nbytes);
    copyBytes(out_ + round * chunk_ + share.begin, stages[p] + share.begin, share.nbytes);
  }
}

// ------------------------------------------------------------------ reduce-scatter

SumShareJob::SumShareJob(Seat seat, DataType dtype, ReduceOp op, std::vector<Part> ins, void* out)
    : seat_(seat),
      dtype_(dtype),
      op_(op),
      ins_(std::move(ins)),
      out_(raw(out)),
      sources_(seat.size) {}

std::size_t SumShareJob::published() const {
  std::size_t nbytes = 0;
  for (const Part& part : ins_) nbytes += part.nbytes;
  return nbytes;
}

void SumShareJob::publish(std::byte* slot) const {
  for (const Part& part : ins_) {
    copyBytes(slot, part.data, part.nbytes);
    slot += part.nbytes;
  }
}

void SumShareJob::sum(Views at, const std::byte* own, std::byte* out, std::size_t nbytes) {
  if (nbytes == 0) return;
  std::copy(at.begin(), at.end(), sources_.begin());
  if (own != nullptr) sources_[seat_.place] = own;
  kernels::reduce(dtype_, op_, sources_, out, nbytes / sizeOf(dtype_));
}

void SumShareJob::collect(Views slots) {
  std::size_t begin = 0;
  for (std::uint32_t p = 0; p < seat_.place; ++p) begin += ins_[p].nbytes;
  std::vector<const std::byte*> at;
  for (const std::byte* slot : slots) at.push_back(slot + begin);
  sum(at, nullptr, out_, ins_[seat_.place].nbytes);
}

std::uint64_t SumShareJob::rounds(std::size_t stage_bytes) {
  piece_ = std::max(kAlign, stage_bytes / seat_.size / kAlign * kAlign);
  std::size_t longest = 0;
  for (const Part& part : ins_) longest = std::max(longest, part.nbytes);
  return divideUp(longest, piece_);
}

void SumShareJob::fill(std::uint64_t round, std::byte* stage) {
  const std::size_t begin = round * piece_;
  for (std::uint32_t p = 0; p < seat_.size; ++p) {
    if (p == seat_.place) continue;
    copyBytes(stage + p * piece_, ins_[p].data + begin, left(ins_[p].nbytes, begin, piece_));
  }
}

void SumShareJob::use(std::uint64_t round, Views stages, std::byte* /*own*/) {
  const std::size_t begin = round * piece_;
  const Part& mine = ins_[seat_.place];
  std::vector<const std::byte*> at;
  for (const std::byte* stage : stages) at.push_back(stage + seat_.place * piece_);
  sum(at, mine.data + begin, out_ + begin, left(mine.nbytes, begin, piece_));
}

// ------------------------------------------------------------------ broadcast, all-gather, gather

SpreadJob::SpreadJob(Seat seat, const void* in, std::vector<Room> outs)
    : seat_(seat), in_(raw(in)), outs_(std::move(outs)) {}

void SpreadJob::publish(std::byte* slot) const { copyBytes(slot, in_, published()); }

void SpreadJob::copyOwn() const {
  const Room& own = outs_[seat_.place];
  if (own.data != nullptr) copyBytes(own.data, in_, own.nbytes);
}

void SpreadJob::collect(Views slots) {
  copyOwn();
  for (std::uint32_t p = 0; p < seat_.size; ++p) {
    if (p != seat_.place && outs_[p].data != nullptr)
      copyBytes(outs_[p].data, slots[p], outs_[p].nbytes);
  }
}

std::uint64_t SpreadJob::rounds(std::size_t stage_bytes) {
  chunk_ = stage_bytes;
  std::size_t longest = 0;
  for (const Room& room : outs_) longest = std::max(longest, room.nbytes);
  return divideUp(longest, chunk_);
}

void SpreadJob::fill(std::uint64_t round, std::byte* stage) {
  const std::size_t begin = round * chunk_;
  const std::size_t nbytes = left(published(), begin, chunk_);
  if (nbytes == 0) return;
  copyBytes(stage, in_ + begin, nbytes);
  std::byte* const own = outs_[seat_.place].data;
  if (own != nullptr) copyBytes(own + begin, in_ + begin, nbytes);
}

void SpreadJob::use(std::uint64_t round, Views stages, std::byte* /*own*/) {
  const std::size_t begin = round * chunk_;
  for (std::uint32_t i = 1; i < seat_.size; ++i) {
    const std::uint32_t p = (seat_.place + i) % seat_.size;
    if (outs_[p].data == nullptr) continue;
    copyBytes(outs_[p].data + begin, stages[p], left(outs_[p].nbytes, begin, chunk_));
  }
}

// ------------------------------------------------------------------ scatter, all-to-all

DealJob::DealJob(Seat seat, std::vector<Part> ins, std::vector<Room> outs)
    : seat_(seat), ins_(std::move(ins)), outs_(std::move(outs)), begins_(seat.size) {}

std::size_t DealJob::published() const {
  std::size_t nbytes = prefix();
  for (const Part& part : ins_) nbytes += part.nbytes;
  return nbytes;
}

void DealJob::publishPrefix(std::byte* slot) const {
  for (std::uint32_t p = 0; p < seat_.size; ++p) {
    const std::uint64_t numbers[] = {ins_[p].nbytes, outs_[p].nbytes};
    std::memcpy(slot + p * sizeof numbers, numbers, sizeof numbers);
  }
}

void DealJob::publish(std::byte* slot) const {
  publishPrefix(slot);
  slot += prefix();
  for (const Part& part : ins_) {
    copyBytes(slot, part.data, part.nbytes);
    slot += part.nbytes;
  }
}

bool DealJob::agrees(Views slots) {
  // All pairs, not only this rank's: all ranks must come to the same conclusion.
  for (std::uint32_t from = 0; from < seat_.size; ++from) {
    begins_[from] = prefix();
    for (std::uint32_t to = 0; to < seat_.size; ++to) {
      const std::uint64_t meant = numberAt(slots[from], 2 * std::size_t{to});
      if (meant != numberAt(slots[to], 2 * std::size_t{from} + 1)) return false;
      longest_ = std::max<std::size_t>(longest_, meant);
      if (to < seat_.place) begins_[from] += meant;
    }
  }
  return true;
}

void DealJob::copyOwn() const {
  const Room& own = outs_[seat_.place];
  if (own.data != nullptr) copyBytes(own.data, ins_[seat_.place].data, own.nbytes);
}

void DealJob::collect(Views slots) {
  copyOwn();
  for (std::uint32_t p = 0; p < seat_.size; ++p) {
    if (p == seat_.place) continue;
    copyBytes(outs_[p].data, slots[p] + begins_[p], outs_[p].nbytes);
  }
}

std::uint64_t DealJob::rounds(std::size_t stage_bytes) {
  piece_ = std::max(kAlign, stage_bytes / seat_.size / kAlign * kAlign);
  return divideUp(longest_, piece_);
}

void DealJob::fill(std::uint64_t round, std::byte* stage) {
  if (round == 0) copyOwn();
  const std::size_t begin = round * piece_;
  for (std::uint32_t p = 0; p < seat_.size; ++p) {
    if (p == seat_.place) continue;
    copyBytes(stage + p * piece_, ins_[p].data + begin, left(ins_[p].nbytes, begin, piece_));
  }
}

void DealJob::use(std::uint64_t round, Views stages, std::byte* /*own*/) {
  const std::size_t begin = round * piece_;
  for (std::uint32_t i = 1; i < seat_.size; ++i) {
    const std::uint32_t p = (seat_.place + i) % seat_.size;
    copyBytes(outs_[p].data + begin, stages[p] + seat_.place * piece_,
              left(outs_[p].nbytes, begin, piece_));
  }
}

}  // namespace reducer::local
