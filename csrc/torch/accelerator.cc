#include "torch/accelerator.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <utility>

namespace reducer::torch_backend {
namespace {

// How often an event that has not happened is asked again. Short beside a copy of a segment.
constexpr auto kPoll = std::chrono::microseconds(20);

}  // namespace

// ------------------------------------------------------------------ copies

DeviceCopies::DeviceCopies(c10::Device device)
    : device_(device),
      down_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)),
      up_(c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device)) {}

void* DeviceCopies::stage(const at::Tensor& tensor, bool reads, bool writes) {
  if (tensor.numel() == 0) return nullptr;
  Staged staged;
  staged.tensor = tensor.detach().view(-1);
  staged.host =
      at::empty({tensor.numel()}, at::TensorOptions().dtype(tensor.dtype()).pinned_memory(true));
  staged.reads = reads;
  staged.writes = writes;
  staged_.push_back(std::move(staged));
  return staged_.back().host.mutable_data_ptr();
}

void DeviceCopies::begin() {
  const auto before = recorded(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
  before->block(down_);
  before->block(up_);
}

std::shared_ptr<c10::Event> DeviceCopies::recorded(const c10::Stream& stream) const {
  auto event = std::make_shared<c10::Event>(device_.type());
  event->record(stream);
  return event;
}

void DeviceCopies::copy(const c10::Stream& stream, const void* host, std::size_t nbytes,
                        bool to_host) {
  if (nbytes == 0) return;
  const auto* at = static_cast<const std::byte*>(host);
  for (const Staged& staged : staged_) {
    const auto* begin = static_cast<const std::byte*>(staged.host.const_data_ptr());
    if (at < begin || at >= begin + staged.host.nbytes()) continue;
    if (to_host ? !staged.reads : !staged.writes) return;
    const auto element = static_cast<std::int64_t>(staged.host.element_size());
    const std::int64_t first = (at - begin) / element;
    const std::int64_t count = static_cast<std::int64_t>(nbytes) / element;
    const at::Tensor there = staged.tensor.narrow(0, first, count);
    const at::Tensor here = staged.host.narrow(0, first, count);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const c10::StreamGuard guard(stream);
    if (to_host) {
      here.copy_(there, /*non_blocking=*/true);
    } else {
      there.copy_(here, /*non_blocking=*/true);
    }
    return;
  }
}

void DeviceCopies::fetch(const void* host, std::size_t nbytes) { copy(down_, host, nbytes, true); }

std::shared_ptr<c10::Event> DeviceCopies::fetched() { return recorded(down_); }

void DeviceCopies::launched() { fetched()->block(up_); }

void DeviceCopies::giveBack(const void* host, std::size_t nbytes) {
  copy(up_, host, nbytes, false);
}

void DeviceCopies::onUpStream(const std::function<void()>& task) const {
  const c10::StreamGuard guard(up_);
  task();
}

std::shared_ptr<c10::Event> DeviceCopies::finished() { return recorded(up_); }

void blockCurrentStreamOn(const c10::Event& event) {
  const c10::impl::VirtualGuardImpl guard(event.device_type());
  event.block(guard.getStream(c10::Device(event.device_type(), event.device_index())));
}

// ------------------------------------------------------------------ the queue

struct LaunchQueue::State {
  struct Launch {
    std::shared_ptr<c10::Event> ready;
    std::function<void()> task;
  };
  struct Kept {
    std::shared_ptr<c10::Event> event;
    std::shared_ptr<const void> memory;
  };
  std::mutex mutex;
  std::condition_variable changed;
  std::deque<Launch> launches;
  std::deque<Kept> kept;
  bool running = false;  // a task that was taken out of the queue
  bool hurried = false;
  bool stopped = false;
  std::thread thread;
};

LaunchQueue::LaunchQueue() : state_(std::make_shared<State>()) {}

LaunchQueue::~LaunchQueue() { stop(); }

void LaunchQueue::start(const std::shared_ptr<State>& state) {
  if (!state->thread.joinable() && !state->stopped) {
    state->thread = std::thread([state] { run(*state); });
  }
  state->changed.notify_one();
}

void LaunchQueue::launch(std::shared_ptr<c10::Event> ready, std::function<void()> task) {
  {
    const std::lock_guard lock(state_->mutex);
    const bool idle = state_->launches.empty() && !state_->running;
    if (!state_->stopped && (ready || !idle)) {
      state_->launches.push_back({std::move(ready), std::move(task)});
      start(state_);
      return;
    }
  }
  task();
}

void LaunchQueue::keep(std::shared_ptr<c10::Event> event, std::shared_ptr<const void> kept) {
  {
    const std::lock_guard lock(state_->mutex);
    if (!state_->stopped) {
      state_->kept.push_back({std::move(event), std::move(kept)});
      start(state_);
      return;
    }
  }
  event->synchronize();
}

void LaunchQueue::run(State& state) {
  std::unique_lock lock(state.mutex);
  while (true) {
    if (!state.launches.empty() &&
        (state.hurried || !state.launches.front().ready || state.launches.front().ready->query())) {
      State::Launch launch = std::move(state.launches.front());
      state.launches.pop_front();
      state.running = true;
      lock.unlock();
      launch.task();
      launch = {};
      lock.lock();
      state.running = false;
    } else if (!state.kept.empty() && state.kept.front().event->query()) {
      State::Kept kept = std::move(state.kept.front());
      state.kept.pop_front();
      lock.unlock();
      kept = {};
      lock.lock();
    } else if (!state.launches.empty() || !state.kept.empty()) {
      state.changed.wait_for(lock, kPoll);
    } else if (state.stopped) {
      return;
    } else {
      state.changed.wait(lock);
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
