// GroupState, where a receive waits for a send of any rank.
#include <cstdio>

#include "collective/group_state.h"
#include "engine/describe.h"
#include "wire/lane.h"

namespace reducer::collective {

std::vector<Receives::Match> GroupState::matchReceives(std::uint32_t tag) {
  return receives_.match(tag, [&](Rank from, std::uint64_t seq) {
    std::uint64_t& next = pair_sequences_[wire::pairLane(from, config_.rank, tag)];
    if (seq != next) return false;
    ++next;
    return true;
  });
}

void GroupState::receive(Rank from, std::uint32_t tag, const wire::Call& call, Duration timeout,
                         std::function<void(Rank, std::optional<std::uint64_t>)> start,
                         std::function<void(const Status&)> fail,
                         const std::shared_ptr<Canceller>& canceller) {
  std::vector<Receives::Match> matches;
  std::uint64_t id = 0;
  Status status;
  {
    const std::lock_guard lock(mutex_);
    status = broken_;
    if (status.ok() && (from == kAllRanks || receives_.waiting(tag))) {
      const std::string whom =
          from == kAllRanks ? "any rank" : "rank " + std::to_string(from) + " (behind another)";
      // What is said of it, for how long.
      const auto tell =
          [call, tag, whom, group = config_.name,
           here = engine::nameRank(config_.rank, config_.host)](const std::string& what) {
            return engine::describe(call) + " from " + whom + ", tag " + std::to_string(tag) +
                   ", in group '" + group + "': " + what + "; here is " + here;
          };
      const auto record = recordReceive(from, tag, call);
      const TimePoint now = transport_.now();
      Receives::Request request;
      request.from = from;
      request.deadline = now + timeout;
      request.late_at = now + timeout / 3;
      request.late = [record, tell, timeout, now, warns = config_.settings.warns](TimePoint at) {
        const std::string text = tell("nothing has been sent for " + engine::seconds(at - now) +
                                      " (after " + engine::seconds(timeout) + " it fails)");
        record->late(text);
        if (warns) std::fprintf(stderr, "reducer: warning: %s\n", text.c_str());
      };
      request.start = [record, start = std::move(start)](Rank sender, std::uint64_t seq) {
        record->passedOn();
        start(sender, seq);
      };
      request.fail = [record, tell, timeout, fail = std::move(fail)](const Status& why) {
        const std::string late = "timeout after " + engine::seconds(timeout) + ", nothing was sent";
        const Status end = why.ok() ? Status(Code::kTimeout, tell(late)) : why;
        record->ended(end);
        fail(end);
      };
      id = receives_.add(tag, std::move(request));
      matches = matchReceives(tag);
      start = nullptr;
    }
  }
  if (!status.ok()) return fail(status);
  if (start) return start(from, std::nullopt);
  if (canceller) {
    canceller->add([weak = weak_from_this(), id](const Status& why) {
      const auto self = weak.lock();
      if (!self) return;
      std::vector<Receives::Request> removed;
      {
        const std::lock_guard lock(self->mutex_);
        removed = self->receives_.remove(id);
      }
      for (const Receives::Request& request : removed) request.fail(why);
    });
  }
  for (const Receives::Match& match : matches) match.request.start(match.from, match.seq);
}

void GroupState::onArrived(const wire::SlotId& slot) {
  std::vector<Receives::Match> matches;
  {
    const std::lock_guard lock(mutex_);
    if (slot.seq < pair_sequences_[slot.lane]) return;  // a receive came meanwhile
    receives_.arrived(wire::tagOf(slot.lane), wire::senderOf(slot.lane), slot.seq);
    matches = matchReceives(wire::tagOf(slot.lane));
  }
  for (const Receives::Match& match : matches) match.request.start(match.from, match.seq);
}

}  // namespace reducer::collective
