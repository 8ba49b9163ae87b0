#include "local/team.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "common/check.h"

namespace reducer::local {
namespace {

std::size_t pages(std::size_t nbytes) { return (nbytes + 4095) / 4096 * 4096; }

}  // namespace

std::size_t Team::segmentBytes(const Config& config) {
  return sizeof(Head) + config.ranks.size() * (sizeof(Member) + pages(config.area_bytes));
}

Team::Team(Config config)
    : config_(std::move(config)),
      pid_(getpid()),
      area_bytes_(pages(config_.area_bytes)),
      rendezvous_({config_.name, config_.place, static_cast<std::uint32_t>(config_.ranks.size()),
                   segmentBytes(config_)}),
      waiter_(config_.ranks.size() > Waiter::cores()) {
  REDUCER_CHECK(config_.place < config_.ranks.size() && config_.ranks.size() <= 4096);
}

Team::~Team() {
  if (getpid() == pid_) leave();
}

Status Team::attach(Watch& watch) {
  if (attached()) return {};
  if (Status status = rendezvous_.run(watch); !status.ok()) return status;
  segment_ = rendezvous_.take();
  if (!segment_) return {};
  head_ = reinterpret_cast<Head*>(segment_->data());
  members_ = reinterpret_cast<Member*>(segment_->data() + sizeof(Head));
  areas_ = segment_->data() + sizeof(Head) + config_.ranks.size() * sizeof(Member);
  Member& own = members_[config_.place];
  const std::size_t nbytes = std::min(config_.host.size(), own.host.size() - 1);
  std::memcpy(own.host.data(), config_.host.data(), nbytes);
  own.state.store(kHere);
  attached_.store(true, std::memory_order_release);
  return {};
}

std::string Team::name(std::uint32_t place) const {
  std::string host = place == config_.place ? config_.host : "has not connected";
  if (attached() && members_[place].state.load() != kAbsent) {
    const auto& text = members_[place].host;
    host.assign(text.data(), strnlen(text.data(), text.size()));
  }
  return "rank " + std::to_string(config_.ranks[place]) + " (" + host + ")";
}

Gate::Turn Team::arrive(std::uint32_t number) {
  // Others may still have to learn of operations that this rank gave up before it was attached.
  for (std::uint32_t behind = gate().number(); static_cast<std::int32_t>(number - behind) > 0;
       behind = gate().number()) {
    giveUp(behind, missed_.ok() ? Status(Code::kTimeout, name(place()) + " gave it up") : missed_);
  }
  return gate().arrive(number, size(), [this] {
    if (rounds().value.load(std::memory_order_relaxed) != 0) rounds().value.store(0);
  });
}

void Team::tell(std::uint32_t number, const Status& why) {
  const std::lock_guard lock(told_mutex_);
  Told& told = members_[config_.place].told[told_next_++ % kTold];
  told.tag.store(0);
  told.code.store(static_cast<std::uint64_t>(why.code()));
  std::array<char, kTextWords * 8> text{};
  std::memcpy(text.data(), why.message().data(), std::min(why.message().size(), text.size() - 1));
  for (std::size_t i = 0; i < kTextWords; ++i) {
    std::uint64_t word;
    std::memcpy(&word, text.data() + 8 * i, 8);
    told.text[i].store(word);
  }
  told.tag.store(std::uint64_t{number} + 1);
}

void Team::giveUp(std::uint32_t number, const Status& why) {
  if (!attached()) {
    const std::lock_guard lock(told_mutex_);
    if (missed_.ok()) missed_ = why;
    return;
  }
  tell(number, why);
  if (gate().giveUp(number)) return;
  // Else nobody can be in it any more, or nobody ever was.
  if (gate().number() != number + 1 || gate().turnOf(number) != Gate::Turn::kComplete) return;
  head_->given_up.store(std::uint64_t{number} + 1);
  gate().stir();
  rounds().stir();
}

void Team::giveUpMeeting(std::uint32_t number, const Status& why) {
  tell(number, why);
  gate().giveUp(number);
}

Status Team::givenUp(std::uint32_t number) const {
  const std::uint64_t wanted = std::uint64_t{number} + 1;
  for (std::uint32_t place = 0; place < size(); ++place) {
    for (const Told& told : members_[place].told) {
      if (told.tag.load() != wanted) continue;
      const auto code = static_cast<Code>(told.code.load());
      std::array<char, kTextWords * 8> text;
      for (std::size_t i = 0; i < kTextWords; ++i) {
        const std::uint64_t word = told.text[i].load();
        std::memcpy(text.data() + 8 * i, &word, 8);
      }
      if (told.tag.load() != wanted || code == Code::kOk) continue;
      return Status(code, std::string(text.data(), strnlen(text.data(), text.size())));
    }
  }
  return {};
}

void Team::leave() {
  if (!attached()) return;
  members_[config_.place].state.store(kLeft);
  gate().stir();
  rounds().stir();
  for (Counter& counter : members_[config_.place].counters) counter.stir();
}

std::optional<Team::Gone> Team::gone() const {
  for (std::uint32_t place = 0; place < size(); ++place) {
    if (place == config_.place) continue;
    const std::uint32_t state = members_[place].state.load();
    // The place was occupied before anybody could attach.
    const bool died =
        state != kLeft && !segment_->occupied(place) && members_[place].state.load() != kLeft;
    if (!died && state != kLeft) continue;
    return Gone{place, died,
                name(place) + (died ? " was lost (its process ended)" : " left the group")};
  }
  return std::nullopt;
}

}  // namespace reducer::local
