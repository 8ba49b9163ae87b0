// How a call becomes operations of the group, and its Work.
#include <algorithm>
#include <utility>

#include "torch/backend.h"

namespace reducer::torch_backend {

using collective::CallOptions;
using collective::Done;
namespace {

// Of a device's tensor, copied and sent as one: large enough for the copy's own cost not to show,
// small enough for copies and network to overlap in a bucket of DDP (25 MiB).
constexpr std::size_t kSegmentBytes = std::size_t{4} << 20;

/// The same buffers, let go on the completion thread, whoever has the last reference: the
/// transport's threads must not wait for what a foreign owner of memory does at its end.
std::shared_ptr<Buffers> releasedElsewhere(std::shared_ptr<Buffers> buffers,
                                           std::shared_ptr<CompletionThread> completions) {
  Buffers* const raw = buffers.get();
  return {raw, [held = std::move(buffers), completions = std::move(completions)](Buffers*) mutable {
            completions->post([held = std::move(held)] {});
          }};
}

/// For ranks that are out of step: nothing more can work here, and the others learn of it at once.
void endGroup(collective::Group& group, const std::string& why) {
  group.abort(why);
  group.close();
}

/// Ranks whose calls differ have cut them into different numbers of slices, and so are out of step.
Done breakingOnMismatch(const std::shared_ptr<collective::Group>& group, Done done) {
  return [weak = std::weak_ptr(group), done = std::move(done)](const Status& status) {
    done(status);
    if (status.code() != Code::kMismatch) return;
    if (const auto alive = weak.lock()) endGroup(*alive, status.message());
  };
}

/// A part in pinned memory, with its share of what is allowed.
struct Loaded {
  LaunchQueue::Share share;  // the last to go
  std::shared_ptr<DeviceCopies::Loaded> copies;
};

/// Brings a part's results to the device when it is done.
Done givingBack(std::shared_ptr<Loaded> loaded, std::shared_ptr<Buffers> buffers,
                std::shared_ptr<LaunchQueue> launches, Done done) {
  return [loaded = std::move(loaded), buffers = std::move(buffers), launches = std::move(launches),
          done = std::move(done)](const Status& status) {
    Status result = status;
    if (status.ok()) {
      try {
        // The memory is let go when the copies from it are done.
        auto kept = std::make_shared<Loaded>(std::exchange(*loaded, {}));
        auto event = kept->copies->giveBack();
        launches->keep(std::move(event), std::move(kept));
      } catch (const std::exception& error) {
        result = Status(Code::kInternal, "the copy to the device: " + textOf(error));
      }
    }
    done(result);
  };
}

}  // namespace

Milliseconds ReducerBackend::timeoutOr(Milliseconds asked) const {
  return asked > Milliseconds(0) ? asked : Milliseconds(timeout_ms_.load());
}

Arguments ReducerBackend::arguments(const Call& call) const {
  const std::string_view title = call.title;
  return Arguments(who_, title.substr(title.find(':') + 1), rank_, size_);
}

c10::intrusive_ptr<ReducerWork> ReducerBackend::makeWork(const Call& call,
                                                         std::shared_ptr<Buffers> buffers,
                                                         std::size_t parts) {
  ReducerWork::Info info;
  info.rank = rank_;
  info.type = call.type;
  info.title = call.title;
  info.who = who_;
  info.sequence = call.numbered ? calls_++ : calls_.load();
  info.source = call.source;
  info.parts = parts;
  info.timeout = call.timeout;
  info.canceller = call.canceller;
  return c10::make_intrusive<ReducerWork>(std::move(info), call.inputs, call.outputs,
                                          std::move(buffers), shared_);
}

Done ReducerBackend::ending(const c10::intrusive_ptr<ReducerWork>& work) const {
  return [work, error = error_type_](const Status& status) {
    if (status.code() == Code::kTimeout) *error = c10d::ErrorType::TIMEOUT;
    if (status.code() == Code::kUnavailable) *error = c10d::ErrorType::REMOTE_ERROR;
    work->partDone(status);
  };
}

WorkPtr ReducerBackend::launch(Call call, std::shared_ptr<Buffers> buffers, std::vector<Part> parts,
                               const Start& start) {
  const std::shared_ptr<Session> session = this->session();
  arguments(call).oneDevice(call.inputs, call.outputs);
  call.timeout = timeoutOr(call.timeout) + Milliseconds(ephemeral_ms_.exchange(0));
  DeviceCopies* const copies = buffers ? buffers->copies() : nullptr;
  if (buffers && buffers->borrowed()) buffers = releasedElsewhere(buffers, shared_.completions);
  if (copies != nullptr) {
    parts = segments(std::move(parts), kSegmentBytes);
    copies->begin();
  }
  const auto work = makeWork(call, buffers, parts.size());
  CallOptions options;
  options.timeout = call.timeout;
  options.keepalive = buffers;
  options.canceller = call.canceller;
  // A device's tensors are launched on another thread, which must not wait.
  options.blocking = call.blocking && copies == nullptr;
  for (Part& one : parts) {
    const auto part = std::make_shared<Part>(std::move(one));
    LaunchQueue::Launch launch;
    Done done = ending(work);
    if (copies != nullptr) {
      const auto loaded = std::make_shared<Loaded>();
      // A receive may hold its memory until what is queued behind it has gone out: it has no limit.
      launch.nbytes = call.numbered ? part->nbytes() : 0;
      launch.deadline = LaunchQueue::Clock::now() + call.timeout;
      launch.prepare = [part, loaded, buffers](LaunchQueue::Share share) {
        std::shared_ptr<c10::Event> fetched;
        loaded->copies = buffers->copies()->load(*part, fetched);
        loaded->share = std::move(share);
        return fetched;
      };
      done = givingBack(loaded, buffers, shared_.launches, std::move(done));
    }
    options.whole_count = part->whole_count;
    if (part->whole_count) done = breakingOnMismatch(session->group, std::move(done));
    launch.start = [session, part, options, start, done](const Status& status) {
      if (status.ok()) return start(*session->group, *part, options, done);
      // The others have taken a number for it, and this rank has not.
      endGroup(*session->group, status.message());
      done(status);
    };
    shared_.launches->launch(std::move(launch));
  }
  return enroll(work);
}

void ReducerBackend::startCoalescing() {
  const std::lock_guard lock(mutex_);
  // What an exception in such a block has left behind goes with it.
  coalesced_[std::this_thread::get_id()].clear();
}

WorkPtr ReducerBackend::endCoalescing() {
  const std::lock_guard lock(mutex_);
  auto works = coalesced_.extract(std::this_thread::get_id());
  TORCH_CHECK(!works.empty(), who_,
              " endCoalescing: startCoalescing was not called on this thread");
  return c10::make_intrusive<CoalescedWork>(rank_, std::move(works.mapped()));
}

WorkPtr ReducerBackend::enroll(WorkPtr work) {
  const std::lock_guard lock(mutex_);
  const auto works = coalesced_.find(std::this_thread::get_id());
  if (works != coalesced_.end()) works->second.push_back(work);
  return work;
}

}  // namespace reducer::torch_backend
