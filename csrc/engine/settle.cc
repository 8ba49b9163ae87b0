#include <array>
#include <bit>
#include <mutex>
#include <new>

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

std::vector<Outgoing> settle(Ready ready, BufferPool& pool) {
  Payload result;
  if (ready.nbytes > 0) {
    const std::shared_ptr<std::byte> buffer = pool.get(ready.nbytes);
    kernels::reduce(ready.call.dtype, ready.call.op, ready.contributions, buffer.get(),
                    ready.nbytes / sizeOf(ready.call.dtype));
    result = Payload(Bytes(buffer.get(), ready.nbytes), buffer);
  }
  ready.contributions.clear();
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
