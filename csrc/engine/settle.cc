#include <algorithm>
#include <array>
#include <bit>
#include <mutex>
#include <new>
#include <utility>

#include "engine/engine.h"
#include "kernels/reduce.h"

namespace reducer::engine {

// Free buffers by size class (powers of two), a few of each: what a steady stream of chunks needs.
struct BufferPool::State {
  static constexpr std::size_t kClasses = 26;  // up to 32 MiB
  static constexpr std::size_t kKeptPerClass = 64;
  static constexpr std::size_t kKeptBytes = std::size_t{16} << 20;
  std::mutex mutex;
  std::array<std::vector<std::byte*>, kClasses> free;
  std::size_t kept_bytes = 0;

  ~State() {
    for (auto& list : free) {
      for (std::byte* buffer : list) release(buffer);
    }
  }
  static std::byte* allocate(std::size_t nbytes) {
    return static_cast<std::byte*>(::operator new (nbytes, std::align_val_t{64}));
  }
  static void release(std::byte* buffer) { ::operator delete (buffer, std::align_val_t{64}); }

  void giveBack(std::byte* buffer, std::size_t size_class) {
    const std::size_t nbytes = std::size_t{1} << size_class;
    {
      const std::lock_guard lock(mutex);
      if (free[size_class].size() < kKeptPerClass && kept_bytes + nbytes <= kKeptBytes) {
        free[size_class].push_back(buffer);
        kept_bytes += nbytes;
        return;
      }
    }
    release(buffer);
  }
};

std::shared_ptr<BufferPool> BufferPool::create() {
  auto pool = std::make_shared<BufferPool>();
  pool->state_ = std::make_shared<State>();
  return pool;
}

std::shared_ptr<std::byte> BufferPool::get(std::size_t nbytes) {
  const std::size_t size_class = std::bit_width(nbytes <= 64 ? std::size_t{63} : nbytes - 1);
  REDUCER_CHECK(size_class < State::kClasses);
  std::byte* buffer = nullptr;
  {
    const std::lock_guard lock(state_->mutex);
    std::vector<std::byte*>& list = state_->free[size_class];
    if (!list.empty()) {
      buffer = list.back();
      list.pop_back();
      state_->kept_bytes -= std::size_t{1} << size_class;
    }
  }
  if (buffer == nullptr) buffer = State::allocate(std::size_t{1} << size_class);
  return {buffer, [state = state_, size_class](std::byte* b) { state->giveBack(b, size_class); }};
}

namespace {

// What is summed by host is taken in tiles, so that the hosts' sums are still in the cache when
// they are summed: this much for all that a tile touches.
constexpr std::size_t kTilesBytes = 512 << 10;
constexpr std::size_t kTileBytesMin = 4096;
constexpr std::size_t kTileBytesMax = 64 << 10;

// What a result takes up beside its buffer of the pool.
constexpr std::size_t kResultBytes = 128;
constexpr std::size_t kSmallestBuffer = 64;

/// Walks through a payload: the next bytes, in its own pieces.
class Slices {
 public:
  explicit Slices(const Payload& payload) : pieces_(payload.pieces()) {}

  Payload next(std::size_t nbytes) {
    std::vector<Bytes> taken;
    while (nbytes > 0) {
      const Bytes piece = pieces_.front().subspan(at_);
      const std::size_t here = std::min(nbytes, piece.size());
      taken.push_back(piece.first(here));
      nbytes -= here;
      at_ += here;
      if (here == piece.size()) {
        pieces_ = pieces_.subspan(1);
        at_ = 0;
      }
    }
    return Payload(std::move(taken), nullptr);
  }

 private:
  std::span<const Bytes> pieces_;
  std::size_t at_ = 0;
};

void sum(const Ready& ready, std::byte* out) {
  const auto [dtype, op] = std::pair(ready.call.dtype, ready.call.op);
  const std::size_t count = ready.nbytes / sizeOf(dtype);
  if (ready.by_host) {
    sumByHost(*ready.by_host, dtype, op, ready.contributions, out);
  } else if (op == ReduceOp::kAvg &&
             ready.world_size != static_cast<Rank>(ready.contributions.size())) {
    kernels::reduce(dtype, partially(op, dtype), ready.contributions, out, count);
    kernels::divide(dtype, out, count, ready.world_size);
  } else {
    kernels::reduce(dtype, op, ready.contributions, out, count);
  }
}

}  // namespace

void sumByHost(const Placement& placement, DataType dtype, ReduceOp op,
               std::span<const Payload> inputs, std::byte* out) {
  REDUCER_CHECK(inputs.size() == static_cast<std::size_t>(placement.worldSize()));
  const std::size_t element = sizeOf(dtype);
  const std::size_t nbytes = inputs.front().nbytes();
  const ReduceOp part = partially(op, dtype);
  const std::size_t share = kTilesBytes / (inputs.size() + placement.hosts() + 1);
  const std::size_t tile_max = std::clamp(share / 64 * 64, kTileBytesMin, kTileBytesMax);
  std::vector<Slices> slices(inputs.begin(), inputs.end());
  std::vector<std::byte> sums(placement.hosts() * std::min(tile_max, nbytes));
  std::vector<Payload> parts;
  std::vector<Payload> hosts(placement.hosts());
  for (std::size_t done = 0; done < nbytes;) {
    const std::size_t tile = std::min(tile_max, nbytes - done);
    for (Rank host = 0; host < placement.hosts(); ++host) {
      parts.clear();
      for (const Rank rank : placement.ranksOf(host)) parts.push_back(slices[rank].next(tile));
      if (parts.size() == 1) {
        hosts[host] = std::move(parts.front());
        continue;
      }
      std::byte* const to = sums.data() + host * tile;
      kernels::reduce(dtype, part, parts, to, tile / element);
      hosts[host] = Payload(Bytes(to, tile), nullptr);
    }
    kernels::reduce(dtype, part, hosts, out + done, tile / element);
    if (op == ReduceOp::kAvg) {
      kernels::divide(dtype, out + done, tile / element, placement.worldSize());
    }
    done += tile;
  }
}

std::vector<Outgoing> settle(Ready ready, BufferPool& pool) {
  Payload result;
  if (ready.nbytes > 0) {
    const std::shared_ptr<std::byte> buffer = pool.get(ready.nbytes);
    sum(ready, buffer.get());
    result = Payload(Bytes(buffer.get(), ready.nbytes), buffer);
  }
  ready.contributions.clear();
  if (ready.account && ready.nbytes > 0) {
    const std::size_t nbytes = std::bit_ceil(std::max(ready.nbytes, kSmallestBuffer));
    result = charged(result, Charge(ready.account, nbytes + kResultBytes));
  }
  const std::uint32_t checksum = ready.checksum ? wire::crc32c(result) : 0;
  for (Outgoing& reply : ready.replies) {
    if (!reply.wants_result) continue;
    reply.payload = result;
    reply.frame.has_checksum = ready.checksum;
    reply.frame.checksum = checksum;
  }
  return std::move(ready.replies);
}

}  // namespace reducer::engine
