// How the ranks of one host come to share a segment, or agree that they cannot.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"
#include "local/fork.h"
#include "local/progress.h"
#include "local/segment.h"

namespace reducer::local {

/// Place 0 makes the segment and hands it over a socket in the abstract namespace (which leaves
/// nothing behind, and is the network namespace's own) to the others, if they are processes of the
/// same user. They map it and answer; when all have answered, place 0 tells all the same: shared,
/// or why not. So no rank ever uses shared memory while another does not.
///
/// Thread safety: one thread at a time.
class Rendezvous {
 public:
  struct Config {
    std::string name;         ///< of the meeting: equal on all ranks of the team, on no other
    std::uint32_t place = 0;  ///< of this rank in the team
    std::uint32_t size = 1;   ///< of the team
    std::size_t nbytes = 0;   ///< of the segment: who expects another size refuses it
  };

  /// Place 0 can be found from here on. Does not wait, and takes no memory yet.
  explicit Rendezvous(Config config);

  /// Goes on until all agree. Non-ok: what `watch` said; then it can be called again and goes on
  /// where it was.
  Status run(Watch& watch);

  /// After run(): the segment, where this rank has occupied its place; null: refusal() says why.
  std::unique_ptr<Segment> take() { return std::move(segment_); }
  const Status& refusal() const { return refusal_; }

  /// Before that: the places that have not shown up here, as far as this one can know.
  std::vector<std::uint32_t> missing() const;
  /// What keeps this rank from meeting the others, for as long as it lasts; empty: nothing is
  /// known.
  std::string trouble() const;

 private:
  struct Message;
  struct Guest {
    OwnFd socket;
    std::uint32_t place = 0;
    bool greeted = false;
    bool answered = false;
    bool gone = false;
  };

  void listen();
  void makeSegment();
  Status host(Watch& watch);
  bool admit();
  void hear(Guest& guest);
  void conclude();
  void tellMissing();
  Status visit(Watch& watch);
  bool knock();
  bool hearHost();
  void take(const Message& offer, OwnFd fd);

  const Config config_;
  bool decided_ = false;
  Status refusal_;
  std::vector<std::uint32_t> told_missing_;  // by place 0
  std::string trouble_;                      // of the last attempt to find place 0
  std::unique_ptr<Segment> segment_;
  OwnFd socket_;               // place 0: listens; others: to place 0
  std::vector<Guest> guests_;  // of place 0
};

}  // namespace reducer::local
