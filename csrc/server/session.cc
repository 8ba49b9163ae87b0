#include "server/session.h"

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "server/tokens.h"
#include "wire/lane.h"

namespace reducer::server {
namespace {

// Far above what a worker has: 1,024 in a lane.
constexpr std::int64_t kOutstandingFramesMax = 1 << 16;

// What a frame takes up besides its payload: where it waits, and its answer's header on the way
// out.
constexpr std::uint64_t kFrameBytes = 384;

// Buffers have 128 KiB (tcp): a small payload is not to hold all that, and none is where buffers
// are held that are far larger than what is in them.
constexpr std::size_t kCopiedBytes = 4096;
constexpr std::uint64_t kBuffersMin = 32 << 20;

// Texts on their way to a worker; those beyond are cut to what names the operation.
constexpr std::int64_t kUnreadTextMax = 1 << 20;
constexpr std::size_t kShortTextBytes = 160;

// Of a host in two levels (4 of 1 MiB).
constexpr std::uint64_t kSegmentsUnderWay = 4 << 20;

// Results that are kept for the case that they come damaged. A worker has 1,024 in a lane.
constexpr std::size_t kAnsweredMax = 4096;

// What may come again, in windows of this reducer.
constexpr std::uint64_t kAgainWindows = 16;

// What moves here when an owner is lost goes ahead of what is under way, a window for each loss.
// (Nobody has that many to lose.)
constexpr std::uint32_t kEpochsMax = 64;

}  // namespace

void Session::onFrame(wire::Frame frame, Payload payload) {
  if (Status status = dispatch(frame, std::move(payload)); !status.ok()) {
    refuse(status.code(), status.message());
  }
}

Status Session::dispatch(const wire::Frame& frame, Payload payload) {
  pulse_.heard();
  if (Status status = charge(frame, payload); !status.ok()) return status;
  const bool ordered = frame.kind == wire::FrameKind::kPush ||
                       frame.kind == wire::FrameKind::kCancel ||
                       frame.kind == wire::FrameKind::kSettled;
  if (ordered && !in_process && (!backlog_.empty() || isDamaged(frame, payload))) {
    return holdBack(frame, std::move(payload));
  }
  return handle(frame, std::move(payload));
}

Status Session::handle(const wire::Frame& frame, Payload payload) {
  switch (frame.kind) {
    case wire::FrameKind::kHello:
      return hello(frame.hello);
    case wire::FrameKind::kPush:
      return push(frame, std::move(payload));
    case wire::FrameKind::kCancel:
      return state_->cancel(shared_from_this(), frame);
    case wire::FrameKind::kBye:
      said_bye_ = true;
      return {};
    case wire::FrameKind::kSettled:
      if (frame.epoch <= settled_epoch_) return {};  // costs a look at every slot
      again_bytes_ = 0;
      again_frames_ = 0;
      settled_epoch_ = frame.epoch;
      return state_->settled(shared_from_this(), frame);
    case wire::FrameKind::kLost:
    case wire::FrameKind::kBack:
    case wire::FrameKind::kHold:
      return onMembership(frame);
    case wire::FrameKind::kBeat:
      return {};
    case wire::FrameKind::kResend:
      return resend(frame.slot);
    default:
      return Status(Code::kInvalidArgument, "a worker does not send frames of kind " +
                                                std::to_string(static_cast<int>(frame.kind)));
  }
}

Status Session::onMembership(const wire::Frame& frame) {
  if (state_->options.standalone || hello_.job.empty()) {
    return Status(Code::kInvalidArgument, "lost owners are rank 0's to know");
  }
  if (frame.kind == wire::FrameKind::kLost) state_->lose(hello_, frame);
  if (frame.kind == wire::FrameKind::kBack) state_->back(hello_, frame);
  if (frame.kind == wire::FrameKind::kHold) state_->held(hello_, frame);
  return {};
}

Status Session::push(const wire::Frame& frame, Payload payload) {
  const std::string who = "rank " + std::to_string(hello_.rank);
  if (state_->options.standalone && wire::isPairLane(frame.slot.lane)) {
    return Status(
        Code::kInvalidArgument,
        who + " sends through a standalone reducer; send and recv go to the other worker");
  }
  // The memory that was promised at hello is all that a worker gets: its own window. (What a
  // worker's own reducer holds for it is the worker's own memory, and send and recv never go
  // through another host.)
  if (frame.epoch > epoch_) epoch_ = frame.epoch;
  if (frame.again) return again(frame, std::move(payload));
  const auto length = windowed(frame);
  const std::int64_t outstanding = outstanding_bytes_.fetch_add(length) + length;
  if (outstanding > 0 &&
      static_cast<std::uint64_t>(outstanding - 1) / windows() >= hello_.window_bytes) {
    return Status(Code::kResourceExhausted, who + " has " + std::to_string(outstanding) +
                                                " bytes outstanding, more than the window of " +
                                                std::to_string(hello_.window_bytes) +
                                                " that it announced");
  }
  if (++outstanding_frames_ > kOutstandingFramesMax && state_->options.standalone) {
    return Status(
        Code::kResourceExhausted,
        who + " has more than " + std::to_string(kOutstandingFramesMax) + " chunks outstanding");
  }
  return pushed(frame, std::move(payload));
}

Status Session::pushed(const wire::Frame& frame, Payload payload) {
  Status status = state_->push(shared_from_this(), frame, std::move(payload));
  return status.code() == Code::kResourceExhausted ? noMemory() : status;
}

std::uint64_t Session::windows() const {
  const std::uint32_t epoch = epoch_;
  const std::uint32_t calm = calm_epoch_;
  return 1 + std::min(epoch > calm ? epoch - calm : 0, kEpochsMax);
}

// A worker keeps no more than two windows of what an owner answered, whose window may be larger
// than this one's, and in two levels what carriers of other shares may be behind: segments under
// way.
Status Session::again(const wire::Frame& frame, Payload payload) {
  const std::uint64_t nbytes = again_bytes_ += payload.nbytes();
  const auto frames = static_cast<std::int64_t>(++again_frames_);
  if (frame.epoch == 0 || wire::operationLane(frame.slot.lane) != wire::kCollectiveLane ||
      nbytes / windows() / kAgainWindows > hello_.window_bytes + kSegmentsUnderWay ||
      frames > kOutstandingFramesMax) {
    return Status(Code::kInvalidArgument,
                  "rank " + std::to_string(hello_.rank) + " sends " + std::to_string(frames) +
                      " chunks of " + std::to_string(nbytes) +
                      " bytes again, more than lost reducers can have answered");
  }
  return pushed(frame, std::move(payload));
}

// Its own worker's pushes are that worker's memory.
Status Session::charge(const wire::Frame& frame, Payload& payload) {
  if (in_process || frame.kind != wire::FrameKind::kPush || !account_) return {};
  const std::uint64_t nbytes = payload.nbytes() + kFrameBytes;
  bool ok = false;
  Charge charge = Charge::ifPossible(account_, nbytes, &ok);
  if (!ok) {
    state_->forgetAnswers(hello_.job);
    charge = Charge::ifPossible(account_, nbytes, &ok);
  }
  if (!ok) return noMemory();
  const std::uint64_t limit = state_->memory->limit();
  const bool crowded = state_->transport.bufferedBytes() >
                       state_->memory->held() + std::max(limit / 16, kBuffersMin);
  payload = charged(payload, std::move(charge), crowded ? SIZE_MAX : kCopiedBytes);
  return {};
}

Status Session::noMemory() const {
  const auto mebibytes = [](std::uint64_t nbytes) { return std::to_string(nbytes >> 20) + " MiB"; };
  return Status(Code::kResourceExhausted,
                "the reducer " + state_->options.host + " has no memory for what rank " +
                    std::to_string(hello_.rank) + " (" + hello_.host +
                    ") pushes: its group holds more than the " + mebibytes(account_->promise()) +
                    " that it was promised, and of the limit of " +
                    mebibytes(state_->memory->limit()) +
                    " nothing else is free; raise --memory-limit");
}

std::int64_t Session::windowed(const wire::Frame& frame) const {
  if (state_->options.standalone) return static_cast<std::int64_t>(frame.length);
  if (in_process || wire::operationLane(frame.slot.lane) != wire::kCollectiveLane) return 0;
  return static_cast<std::int64_t>(frame.length);
}

Status Session::hello(const wire::Hello& hello) {
  {
    const std::lock_guard lock(mutex_);
    if (refused_) return {};
    if (joined_) return Status(Code::kInvalidArgument, "a second hello on one connection");
    // First: a stranger learns nothing of this reducer. (It may read the file, which is nothing to
    // do with the registry's lock held.)
    TokenFile* const tokens = state_->options.tokens.get();
    if (tokens != nullptr && !tokens->admits(hello.token)) return notAdmitted();
    if (hello.version != kProtocolVersion) {
      return Status(Code::kVersion, "this reducer (" + state_->options.host +
                                        ") speaks protocol version " +
                                        std::to_string(kProtocolVersion) + ", the worker speaks " +
                                        std::to_string(hello.version) +
                                        "; install the same version of reducer on both");
    }
    hello_ = hello;
    auto account = state_->join(shared_from_this(), hello);
    if (!account.ok()) return account.status();
    account_ = std::move(account).value();
    joined_ = true;
  }
  // A chunk is no larger than the window, and a header has at most some texts.
  const std::uint64_t chunk = std::min<std::uint64_t>(hello.window_bytes, kMaxChunkBytes);
  connection_->admit(state_->options.standalone ? chunk + 3 * kMaxTextBytes : kMaxMessageBytes);
  wire::Frame reply;
  reply.kind = wire::FrameKind::kWelcome;
  reply.hello.version = kProtocolVersion;
  reply.hello.host = state_->options.host;
  connection_->send(reply, {});
  state_->tellLost(shared_from_this(), hello);
  return {};
}

std::string Session::job() {
  const std::lock_guard lock(mutex_);
  return joined_ ? hello_.job : std::string();
}

void Session::answer(const wire::Frame& frame, Payload payload) {
  const std::int64_t outstanding = outstanding_bytes_ -= windowed(frame);
  // All that had moved here was sent, and what follows goes in order: there is one window again.
  if (const std::uint32_t settled = settled_epoch_;
      settled > calm_epoch_ && outstanding <= static_cast<std::int64_t>(hello_.window_bytes)) {
    calm_epoch_ = settled;
  }
  if (frame.kind == wire::FrameKind::kResult || frame.kind == wire::FrameKind::kError) {
    --outstanding_frames_;
  }
  if (frame.has_checksum && payload.nbytes() > 0 && !in_process) {
    remember(frame, payload);
  }
  deliver(frame, std::move(payload));
}

void Session::deliver(const wire::Frame& frame, Payload payload) {
  if (!state_->options.counts_unread || in_process) {
    return connection_->send(frame, std::move(payload));
  }
  bool ok = false;
  Charge charge = Charge::ifPossible(account_, kFrameBytes + frame.text.size(), &ok);
  const bool long_text = frame.text.size() > kShortTextBytes;
  if (long_text && (!ok || unread_->text_bytes > kUnreadTextMax)) {
    wire::Frame brief = frame;
    brief.text.resize(kShortTextBytes);
    return deliver(brief, std::move(payload));
  }
  if (!ok && frame.kind == wire::FrameKind::kLate) return;
  if (!ok) charge = Charge(account_, kFrameBytes + frame.text.size());
  payload = counted(frame, payload, std::move(charge));
  if (withinPromise()) return connection_->send(frame, std::move(payload));
  const std::string text =
      "rank " + std::to_string(hello_.rank) + " (" + hello_.host +
      ") does not read its results: " + std::to_string(unread_->bytes) + " bytes in " +
      std::to_string(unread_->frames) +
      " frames wait for it; with what it pushes that is more than twice the window of " +
      std::to_string(hello_.window_bytes) + " bytes that it announced";
  {
    const std::lock_guard lock(mutex_);
    if (std::exchange(refused_, true)) return;
  }
  ++state_->refused;
  // Nothing more is queued for it: it would not read that, either.
  connection_->close(Status(Code::kResourceExhausted, text), /*flush=*/false);
}

// ------------------------------------------------------------------ damage on the way

bool Session::isDamaged(const wire::Frame& frame, const Payload& payload) {
  return frame.has_checksum && payload.nbytes() > 0 && wire::crc32c(payload) != frame.checksum;
}

// What comes behind a damaged push waits until that has come whole: a worker's word that it has
// moved all its pieces says something of those before it only.
Status Session::holdBack(const wire::Frame& frame, Payload payload) {
  if (job().empty()) return Status(Code::kInvalidArgument, "a chunk before the hello");
  const bool damaged = isDamaged(frame, payload);
  const auto missing = findMissing(frame.slot, frame.again);
  bool ok = false;
  Charge charge = Charge::ifPossible(account_, frame.text.size() + sizeof(Held), &ok);
  if (!ok) return noMemory();
  // (A push counts against the window when it is its turn.)
  if (backlog_bytes_ / windows() / kAgainWindows > hello_.window_bytes ||
      backlog_.size() > static_cast<std::size_t>(kOutstandingFramesMax)) {
    return Status(Code::kResourceExhausted, "rank " + std::to_string(hello_.rank) +
                                                " sends on and on behind a chunk that came "
                                                "damaged, and not that once more");
  }
  if (damaged) {
    if (++damaged_in_row_ > kDamagedInRowMax) {
      return Status(Code::kInternal,
                    "a chunk of rank " + std::to_string(hello_.rank) + " (" + hello_.host +
                        ") arrived at " + state_->options.host +
                        " with a wrong checksum: memory or network damaged it on the way");
    }
    ++state_->damaged;
    wire::Frame reply;
    reply.kind = wire::FrameKind::kResend;
    reply.slot = frame.slot;
    deliver(reply, {});
    if (missing == backlog_.end()) {
      backlog_.push_back({frame, {}, /*missing=*/true, std::move(charge)});
    }
    return {};
  }
  damaged_in_row_ = 0;
  backlog_bytes_ += payload.nbytes();
  if (frame.kind == wire::FrameKind::kPush && missing != backlog_.end()) {
    *missing = {frame, std::move(payload), /*missing=*/false, std::move(charge)};
    return workOff();
  }
  backlog_.push_back({frame, std::move(payload), /*missing=*/false, std::move(charge)});
  return {};
}

std::deque<Session::Held>::iterator Session::findMissing(const wire::SlotId& slot,
                                                         std::optional<bool> again) {
  return std::find_if(backlog_.begin(), backlog_.end(), [&](const Held& held) {
    return held.missing && held.frame.slot == slot && (!again || held.frame.again == *again);
  });
}

Status Session::workOff() {
  while (!backlog_.empty() && !backlog_.front().missing) {
    Held held = std::move(backlog_.front());
    backlog_.pop_front();
    backlog_bytes_ -= held.payload.nbytes();
    if (Status status = handle(held.frame, std::move(held.payload)); !status.ok()) return status;
  }
  return {};
}

// A result that came damaged keeps its place in the worker's window until it has come whole. So no
// more than about a window is answered meanwhile; two are kept. Sessions share the bytes.
void Session::remember(const wire::Frame& frame, const Payload& payload) {
  std::deque<Answered> dropped;
  Payload kept = payload;
  if (!state_->options.standalone && frame.call.op == ReduceOp::kNone) {
    // It may be the memory of this process' worker, whose call is not to last until it is dropped.
    const std::size_t nbytes = payload.nbytes();
    auto copy = std::make_shared<std::vector<std::byte>>(nbytes);
    payload.copyTo(copy->data());
    kept = Payload(Bytes(copy->data(), nbytes), copy);
  }
  bool ok = false;
  Charge charge = Charge::ifPossible(account_, sizeof(Answered), &ok);
  if (!ok) return;
  const std::lock_guard lock(answered_mutex_);
  answered_.push_back({frame, std::move(kept), std::move(charge)});
  answered_bytes_ += payload.nbytes();
  while (answered_.size() > kAnsweredMax ||
         (answered_.size() > 1 && answered_bytes_ > 2 * hello_.window_bytes * windows())) {
    answered_bytes_ -= answered_.front().payload.nbytes();
    dropped.push_back(std::move(answered_.front()));
    answered_.pop_front();
  }
}

void Session::forgetAnswers() {
  std::deque<Answered> dropped;
  const std::lock_guard lock(answered_mutex_);
  dropped.swap(answered_);
  answered_bytes_ = 0;
}

Status Session::resend(const wire::SlotId& slot) {
  if (const auto missing = findMissing(slot, std::nullopt); missing != backlog_.end()) {
    backlog_.erase(missing);  // the worker has given it up
    return workOff();
  }
  wire::Frame frame;
  Payload payload;
  {
    const std::lock_guard lock(answered_mutex_);
    const auto found = std::find_if(answered_.begin(), answered_.end(),
                                    [&](const Answered& one) { return one.frame.slot == slot; });
    if (found == answered_.end()) {
      return Status(Code::kInvalidArgument, "rank " + std::to_string(hello_.rank) +
                                                " asks for a result that it was not given lately");
    }
    frame = found->frame;
    payload = found->payload;
  }
  ++state_->damaged;
  deliver(frame, std::move(payload));
  return {};
}

Payload Session::counted(const wire::Frame& frame, const Payload& payload, Charge charge) {
  struct Hold {
    Hold(std::shared_ptr<Unread> u, std::size_t n, std::size_t text, Charge c,
         std::shared_ptr<const void> o)
        : unread(std::move(u)),
          nbytes(static_cast<std::int64_t>(n)),
          text_bytes(static_cast<std::int64_t>(text)),
          charge(std::move(c)),
          owner(std::move(o)) {
      unread->bytes += nbytes;
      unread->text_bytes += text_bytes;
      ++unread->frames;
    }
    ~Hold() {
      unread->bytes -= nbytes;
      unread->text_bytes -= text_bytes;
      --unread->frames;
    }
    std::shared_ptr<Unread> unread;
    std::int64_t nbytes;
    std::int64_t text_bytes;
    Charge charge;
    std::shared_ptr<const void> owner;
  };
  auto hold = std::make_shared<Hold>(unread_, payload.nbytes(), frame.text.size(),
                                     std::move(charge), payload.owner());
  const std::span<const Bytes> pieces = payload.pieces();
  if (pieces.size() == 1) return Payload(pieces[0], std::move(hold));
  return Payload(std::vector<Bytes>(pieces.begin(), pieces.end()), std::move(hold));
}

bool Session::withinPromise() const {
  const auto window = static_cast<std::int64_t>(hello_.window_bytes * windows());
  const std::int64_t pushed = std::max<std::int64_t>(outstanding_bytes_, 0);
  return pushed + unread_->bytes <= 2 * window && unread_->frames <= 2 * kOutstandingFramesMax;
}

bool Session::failsOver() {
  const std::lock_guard lock(mutex_);
  return joined_ && hello_.failover;
}

void Session::beat(TimePoint now) {
  Duration heartbeat{};
  {
    const std::lock_guard lock(mutex_);
    if (!joined_ || in_process) return;
    heartbeat = std::chrono::milliseconds(hello_.heartbeat_ms);
  }
  if (heartbeat == Duration::zero()) return;
  const transport::Pulse::Verdict verdict = pulse_.feel(now, heartbeat);
  if (verdict == transport::Pulse::Verdict::kSilent) {
    close(transport::Pulse::silence(heartbeat), /*flush=*/false);
  } else if (verdict == transport::Pulse::Verdict::kSpeak) {
    wire::Frame frame;
    frame.kind = wire::FrameKind::kBeat;
    send(frame);
  }
}

void Session::refuse(Code code, const std::string& text) {
  {
    const std::lock_guard lock(mutex_);
    if (refused_) return;
    refused_ = true;
  }
  ++state_->refused;
  wire::Frame reply;
  reply.kind = wire::FrameKind::kError;
  reply.fatal = true;
  reply.code = code;
  reply.text = text;
  connection_->send(reply, {});
  connection_->close(Status(code, text), /*flush=*/true);
}

void Session::onClosed(const Status& reason) {
  bool joined = false;
  {
    const std::lock_guard lock(mutex_);
    joined = joined_;
    joined_ = false;
    refused_ = true;  // nothing that still comes is taken in
  }
  Status why = reason;
  if (said_bye_) {
    why = {};
  } else if (reason.ok()) {
    why = Status(Code::kUnavailable, "its connection was closed without a goodbye");
  }
  if (joined) state_->leave(shared_from_this(), hello_, why);
  const std::lock_guard lock(state_->registry_mutex);
  state_->sessions.erase(shared_from_this());
  state_->silent.erase(shared_from_this());
  state_->session_gone.notify_all();
}

}  // namespace reducer::server
