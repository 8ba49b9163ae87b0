// GroupState, where collectives go in two levels.
#include <algorithm>

#include "collective/group_state.h"
#include "common/hexadecimal.h"

namespace reducer::collective {
namespace {

// Below, one hop of all ranks' bytes takes less time than two levels.
constexpr std::size_t kTwoLevelBytesMin = 256 << 10;

}  // namespace

const ShardMap* GroupState::rails(const Routes::Route& route, std::size_t nbytes,
                                  bool owned) const {
  if (rails_.empty()) return nullptr;
  const std::size_t chunk_bytes = config_.settings.chunk_bytes;
  if (nbytes < std::min(kTwoLevelBytesMin, segmentBytes(placement_, chunk_bytes))) return nullptr;
  if (owned && ownedSegmentBytes(placement_, chunk_bytes) == 0) return nullptr;
  return &rails_[route.map];
}

std::shared_ptr<HostStage> GroupState::makeStage() {
  const Rank host = placement_.hostOf(config_.rank);
  const std::span<const Rank> ranks = placement_.ranksOf(host);
  HostStage::Config stage;
  stage.meeting = "levels/" + hexadecimal(config_.job) + "/" + std::to_string(host);
  stage.place = static_cast<std::uint32_t>(std::find(ranks.begin(), ranks.end(), config_.rank) -
                                           ranks.begin());
  stage.ranks.assign(ranks.begin(), ranks.end());
  const std::size_t chunk_bytes = config_.settings.chunk_bytes;
  stage.segment_bytes =
      std::max(segmentBytes(placement_, chunk_bytes), ownedSegmentBytes(placement_, chunk_bytes));
  stage.fail = [weak = weak_from_this()](const std::shared_ptr<Operation>& operation,
                                         const Status& why) {
    if (const auto self = weak.lock()) self->fail(operation, why);
  };
  stage.lost = [weak = weak_from_this()](const Status& why) {
    if (const auto self = weak.lock()) self->abort(why);
  };
  stage.died = [weak = weak_from_this()](Rank rank) {
    const auto self = weak.lock();
    if (!self) return;
    self->loseWorker(rank,
                     self->nameOfRank(rank) + " of group '" + self->config_.name +
                         "' was lost (its process, on this host, has ended)",
                     {});
  };
  stage.pump = [weak = weak_from_this()](const std::vector<OwnerIndex>& owners) {
    if (const auto self = weak.lock()) self->pump(owners);
  };
  return std::make_shared<HostStage>(std::move(stage));
}

std::shared_ptr<HostStage> GroupState::stage() {
  const std::lock_guard lock(mutex_);
  return stage_;
}

}  // namespace reducer::collective
