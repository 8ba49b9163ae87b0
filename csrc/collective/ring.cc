#include "collective/ring.h"

#include <algorithm>
#include <limits>

#include "kernels/reduce.h"

namespace reducer::collective {
namespace {

// Cursor::transfer of a ring's pieces.
constexpr std::uint32_t kPush = 0;
constexpr std::uint32_t kPull = 1;

}  // namespace

RingAllReduce::RingAllReduce(Info info, std::byte* out, Rank rank, Rank world_size,
                             std::size_t chunk_bytes, std::shared_ptr<Link> next)
    : Operation(std::move(info)),
      out_(out),
      rank_(rank),
      n_(world_size),
      next_(std::move(next)),
      nbytes_(this->info().call.count * sizeOf(this->info().call.dtype)) {
  const std::size_t segment = (nbytes_ + n_ - 1) / n_;
  chunks_ = std::max<std::uint64_t>(1, (segment + chunk_bytes - 1) / chunk_bytes);
}

// Segments and chunks are cut at whole elements; the k-th of m parts of x elements starts at k * x
// / m.
Span RingAllReduce::spanOf(std::uint32_t segment, std::uint64_t chunk) const {
  const std::uint64_t element = sizeOf(info().call.dtype);
  const std::uint64_t count = info().call.count;
  const std::uint64_t begin = count * segment / n_;
  const std::uint64_t size = count * (segment + 1) / n_ - begin;
  const std::uint64_t first = begin + size * chunk / chunks_;
  const std::uint64_t last = begin + size * (chunk + 1) / chunks_;
  return {first * element, (last - first) * element};
}

// Steps 0 .. n-2 pass sums on, steps n-1 .. 2n-3 finished segments; in both, what came in step t-1
// goes out in step t.
std::uint32_t RingAllReduce::sentSegment(std::uint32_t step) const {
  return (rank_ + 2 * n_ - step % n_) % n_;
}

std::vector<Cursor> RingAllReduce::pulls() {
  std::vector<Cursor> cursors;
  for (std::uint32_t step = 0; step < 2 * (n_ - 1); ++step) {
    cursors.push_back({shared_from_this(), kPull, step, 0, chunks_});
  }
  return cursors;
}

Cursor RingAllReduce::firstPushes() { return {shared_from_this(), kPush, 0, 0, chunks_}; }

Piece RingAllReduce::piece(std::uint32_t transfer, std::uint32_t position, std::uint64_t round) {
  const bool push = transfer == kPush;
  const std::uint32_t previous = (rank_ + n_ - 1) % n_;
  // What I get in a step is what my neighbour sends in it.
  const std::uint32_t segment =
      push ? sentSegment(position) : (sentSegment(position) + n_ - 1) % n_;
  const Span span = spanOf(segment, round);
  Piece piece;
  piece.frame = frame();
  // A neighbour may be late because of its own neighbour. Who is missing has shown in the
  // comparison, and who dies is noticed by all.
  piece.frame.timeout_ms = 0;
  piece.frame.slot.chunk = static_cast<std::uint32_t>(position * chunks_ + round);
  piece.frame.pusher = static_cast<Rank>(push ? rank_ : previous);
  piece.frame.puller = static_cast<Rank>(push ? (rank_ + 1) % n_ : rank_);
  piece.frame.offset = span.offset;
  piece.frame.length = span.length;
  if (push && span.length > 0) {
    piece.payload = Payload(Bytes(out_ + span.offset, span.length), shared_from_this());
  }
  if (!push) piece.out = out_ + span.offset;
  return piece;
}

void RingAllReduce::accept(const Piece& piece, const Payload& result) {
  // Else the neighbour took a push over. (`out` is no sign: an empty tensor has none.)
  if (piece.frame.puller != static_cast<Rank>(rank_)) return;
  const std::uint64_t number = piece.frame.slot.chunk;
  const auto step = static_cast<std::uint32_t>(number / chunks_);
  const wire::Call& call = info().call;
  const std::size_t count = result.nbytes() / sizeOf(call.dtype);
  if (step < n_ - 1) {
    if (count > 0) {
      kernels::accumulate(call.dtype, call.op, piece.out, result, count);
      if (step == n_ - 2 && call.op == ReduceOp::kAvg)
        kernels::divide(call.dtype, piece.out, count, n_);
    }
  } else {
    result.copyTo(piece.out);
  }
  if (step + 1 == 2 * (n_ - 1)) return;
  const std::uint64_t chunk = number % chunks_;
  // A link that is gone has told the group, which fails this operation.
  std::pair<OwnerIndex, Cursor> push[] = {
      {0, Cursor{shared_from_this(), kPush, step + 1, chunk, chunk + 1}}};
  if (next_->enqueue(push).ok()) {
    next_->pump(std::numeric_limits<std::size_t>::max());
  }
}

}  // namespace reducer::collective
