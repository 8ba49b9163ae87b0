#include "transport/net/guests.h"

#include <sys/resource.h>

#include <algorithm>
#include <utility>

namespace reducer::transport::net {
namespace {

constexpr std::size_t kMostMin = 64;
constexpr std::size_t kMostMax = 1024;

}  // namespace

Guest::Guest(std::shared_ptr<Guests> guests, std::string host)
    : guests_(std::move(guests)), host_(std::move(host)) {}

void Guest::leave() {
  if (!left_.exchange(true)) guests_->left(host_);
}

std::shared_ptr<Guest> Guest::another() { return guests_->enterFrom(host_); }

std::shared_ptr<Guests> Guests::forThisProcess() {
  rlimit limit{};
  const bool known = getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY;
  const std::size_t most =
      known ? std::clamp<std::size_t>(limit.rlim_cur / 4, kMostMin, kMostMax) : kMostMax;
  return std::make_shared<Guests>(most, most / 4);
}

Guests::Guests(std::size_t most, std::size_t most_of_one)
    : most_(most), most_of_one_(most_of_one) {}

std::shared_ptr<Guest> Guests::enter(const std::string& peer) {
  return enterFrom(peer.substr(0, peer.rfind(':')));
}

std::shared_ptr<Guest> Guests::enterFrom(std::string host) {
  {
    const std::lock_guard lock(mutex_);
    const auto found = count_of_.find(host);
    if (count_ >= most_ || (found != count_of_.end() && found->second >= most_of_one_)) {
      ++refused_;
      return nullptr;
    }
    ++count_;
    ++count_of_[host];
  }
  return std::make_shared<Guest>(shared_from_this(), std::move(host));
}

void Guests::left(const std::string& host) {
  const std::lock_guard lock(mutex_);
  --count_;
  if (const auto found = count_of_.find(host); --found->second == 0) count_of_.erase(found);
  if (on_left_) on_left_();
}

void Guests::onLeft(std::function<void()> call) {
  const std::lock_guard lock(mutex_);
  on_left_ = std::move(call);
}

}  // namespace reducer::transport::net
