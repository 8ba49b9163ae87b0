#include "torch/accelerator.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

#include "common/check.h"

namespace reducer::torch_backend {
namespace {

// How often an event that has not happened is asked again. Short beside a copy of a segment.
constexpr auto kPoll = std::chrono::microseconds(20);

// Of one group, for what is on its way between devices and the network. An allocator may hold
// memory back a little longer.
constexpr std::size_t kPinnedBytesMax = std::size_t{16} << 20;

// Places begin where no memory is: whoever uses one as an address is caught.
constexpr std::uintptr_t kFirstPlace = std::uintptr_t{1} << 62;

/// A device that has failed tells so at every event.
bool happened(const c10::Event& event, Status& failed) {
  try {
    return event.query();
  } catch (const std::exception& error) {
    failed = Status(Code::kInternal, std::string("the device: ") + error.what());
    return true;
  }
}

}  // namespace

// ------------------------------------------------------------------ copies

DeviceCopies::DeviceCopies(c10::Device device)
    : device_(device),
      down_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)),
      up_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)),
      next_place_(kFirstPlace) {}

void* DeviceCopies::stage(const at::Tensor& tensor, bool reads, bool writes) {
  if (tensor.numel() == 0) return nullptr;
  const std::uintptr_t place = next_place_;
  next_place_ += tensor.nbytes();
  staged_.push_back({place, tensor.detach().view(-1), reads, writes});
  return reinterpret_cast<void*>(place);
}

std::shared_ptr<c10::Event> DeviceCopies::recorded(const c10::Stream& stream) const {
  auto event = std::make_shared<c10::Event>(device_.type());
  event->record(stream);
  return event;
}

void DeviceCopies::begin() {
  const auto before = recorded(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  before->block(down_);
  before->block(up_);
}

void* DeviceCopies::loadPiece(Loaded& loaded, const void* place, std::size_t nbytes) {
  if (nbytes == 0) return nullptr;
  const auto address = reinterpret_cast<std::uintptr_t>(place);
  // The last that begins at or before the address.
  auto staged =
      std::upper_bound(staged_.begin(), staged_.end(), address,
                       [](std::uintptr_t value, const Staged& one) { return value < one.begin; });
  REDUCER_CHECK(staged != staged_.begin());
  --staged;
  const auto element = static_cast<std::int64_t>(staged->tensor.element_size());
  const std::int64_t first = static_cast<std::int64_t>(address - staged->begin) / element;
  const std::int64_t count = static_cast<std::int64_t>(nbytes) / element;
  Loaded::Piece piece;
  piece.device = staged->tensor.narrow(0, first, count);
  piece.host =
      at::empty({count}, at::TensorOptions().dtype(staged->tensor.dtype()).pinned_memory(true));
  piece.writes = staged->writes;
  if (staged->reads) piece.host.copy_(piece.device, /*non_blocking=*/true);
  loaded.pieces_.push_back(std::move(piece));
  return loaded.pieces_.back().host.mutable_data_ptr();
}

std::shared_ptr<DeviceCopies::Loaded> DeviceCopies::load(Part& part,
                                                         std::shared_ptr<c10::Event>& fetched) {
  std::shared_ptr<Loaded> loaded(new Loaded(*this));
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::StreamGuard guard(down_);
    part.replacePieces(
        [&](const void* place, std::size_t nbytes) { return loadPiece(*loaded, place, nbytes); });
  }
  fetched = recorded(down_);
  return loaded;
}

std::shared_ptr<c10::Event> DeviceCopies::Loaded::giveBack() {
  {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::StreamGuard guard(copies_.up_);
    for (const Piece& piece : pieces_) {
      if (piece.writes) piece.device.copy_(piece.host, /*non_blocking=*/true);
    }
  }
  return copies_.recorded(copies_.up_);
}

void DeviceCopies::onUpStream(const std::function<void()>& task) const {
  const c10::StreamGuard guard(up_);
  task();
}

std::shared_ptr<c10::Event> DeviceCopies::finished() {
  recorded(down_)->block(up_);
  return recorded(up_);
}

void blockCurrentStreamOn(const c10::Event& event) {
  const c10::impl::VirtualGuardImpl guard(event.device_type());
  event.block(guard.getStream(c10::Device(event.device_type(), event.device_index())));
}

// ------------------------------------------------------------------ the queue

struct LaunchQueue::State {
  struct Waiting {
    Launch launch;
    bool prepared = false;
    Status failed;
    std::shared_ptr<c10::Event> ready;
  };
  struct Kept {
    std::shared_ptr<c10::Event> event;
    std::shared_ptr<const void> memory;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Waiting> waiting;  // the first `prepared` of them are
  std::size_t prepared = 0;
  std::deque<Kept> kept;
  std::size_t pinned_bytes = 0;
  bool running = false;  // a launch that was taken out of the queue
  bool hurried = false;
  bool stopped = false;
  std::thread thread;

  bool mayPrepare() const {
    if (prepared == waiting.size()) return false;
    const std::size_t more = waiting[prepared].launch.nbytes;
    return hurried || more == 0 || pinned_bytes == 0 || pinned_bytes + more <= kPinnedBytesMax;
  }
  bool mayStart() {
    if (prepared == 0) return false;
    Waiting& first = waiting.front();
    if (hurried || !first.ready || happened(*first.ready, first.failed)) return true;
    if (Clock::now() < first.launch.deadline) return false;
    first.failed = Status(Code::kTimeout,
                          "the device has not produced the input within the call's timeout; what "
                          "was queued on its stream before the call?");
    return true;
  }
};

LaunchQueue::LaunchQueue() : state_(std::make_shared<State>()) {}

LaunchQueue::~LaunchQueue() { stop(); }

// Called with the lock held.
void LaunchQueue::wake(const std::shared_ptr<State>& state) {
  if (!state->thread.joinable() && !state->stopped) {
    state->thread = std::thread([state] { run(state); });
  }
  state->changed.notify_one();
}

void LaunchQueue::launch(Launch launch) {
  bool stopped = false;
  {
    const std::lock_guard lock(state_->mutex);
    const bool idle = state_->waiting.empty() && !state_->running;
    stopped = state_->stopped;
    if (!stopped && (launch.prepare || !idle)) {
      state_->waiting.push_back({std::move(launch), false, {}, nullptr});
      wake(state_);
      return;
    }
  }
  // After stop() the group refuses by itself what needs no copies.
  launch.start(stopped && launch.prepare ? Status(Code::kAborted, "the group was destroyed")
                                         : Status());
}

void LaunchQueue::keep(std::shared_ptr<c10::Event> event, std::shared_ptr<const void> kept) {
  {
    const std::lock_guard lock(state_->mutex);
    if (!state_->stopped) {
      state_->kept.push_back({std::move(event), std::move(kept)});
      wake(state_);
      return;
    }
  }
  event->synchronize();
}

void LaunchQueue::run(const std::shared_ptr<State>& state) {
  std::unique_lock lock(state->mutex);
  while (true) {
    if (state->mayStart()) {
      State::Waiting first = std::move(state->waiting.front());
      state->waiting.pop_front();
      --state->prepared;
      state->running = true;
      lock.unlock();
      first.launch.start(first.failed);
      first = {};
      lock.lock();
      state->running = false;
    } else if (state->mayPrepare()) {
      State::Waiting& next = state->waiting[state->prepared];
      if (state->hurried) {
        if (next.launch.prepare) next.failed = Status(Code::kAborted, "the group was aborted");
      } else if (next.launch.prepare) {
        const std::size_t nbytes = next.launch.nbytes;
        state->pinned_bytes += nbytes;
        lock.unlock();
        Share share(nullptr, [state, nbytes](void*) {
          const std::lock_guard release(state->mutex);
          state->pinned_bytes -= nbytes;
          state->changed.notify_one();
        });
        std::shared_ptr<c10::Event> ready;
        Status failed;
        try {
          ready = next.launch.prepare(std::move(share));
        } catch (const std::exception& error) {
          failed =
              Status(Code::kInternal, std::string("the copy from the device: ") + error.what());
        }
        share.reset();
        lock.lock();
        next.ready = std::move(ready);
        next.failed = std::move(failed);
      }
      ++state->prepared;
    } else if (Status ignored;
               !state->kept.empty() && happened(*state->kept.front().event, ignored)) {
      State::Kept kept = std::move(state->kept.front());
      state->kept.pop_front();
      lock.unlock();
      kept = {};
      lock.lock();
    } else if (state->prepared > 0 || !state->kept.empty()) {
      state->changed.wait_for(lock, kPoll);  // an event tells nobody that it happened
    } else if (state->stopped && state->waiting.empty()) {
      return;
    } else {
      state->changed.wait(lock);
    }
  }
}

void LaunchQueue::hurry() {
  const std::lock_guard lock(state_->mutex);
  state_->hurried = true;
  state_->changed.notify_one();
}

void LaunchQueue::stop() {
  std::thread thread;
  {
    const std::lock_guard lock(state_->mutex);
    state_->stopped = true;
    state_->hurried = true;
    state_->changed.notify_one();
    thread = std::move(state_->thread);
  }
  if (thread.joinable()) thread.join();
}

}  // namespace reducer::torch_backend
