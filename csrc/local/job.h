// The collectives of a team as copies and sums in shared memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "common/types.h"

namespace reducer::local {

/// Where each place of the team has put something, by place.
using Views = std::span<const std::byte* const>;

/// One rank's part in a collective: what it puts into its own memory, and what it makes of the
/// others'. Small ones take one hop: everybody publishes all that it contributes, then collects.
/// Larger ones go in rounds through a stage of bounded size: fill, use what all have filled, and
/// where hasFinish(), use what all have made of it. The memory that fill() and use() write to in
/// round r is that of round r - 2.
///
/// Lifetime: refers to the caller's memory. Thread safety: one thread at a time.
class Job {
 public:
  virtual ~Job() = default;

  /// Bytes that publish() writes.
  virtual std::size_t published() const = 0;
  virtual void publish(std::byte* slot) const = 0;
  /// Up to so many published bytes go in one hop, for slots of this size; equal on all ranks.
  virtual std::size_t hopBytesMax(std::size_t slot_bytes) const { return slot_bytes; }
  /// Bytes at the beginning of what is published that all ranks need before the rounds, too.
  virtual std::size_t prefix() const { return 0; }
  virtual void publishPrefix(std::byte* /*slot*/) const {}
  /// False: the ranks' calls do not fit together. Sees what all have published, at least the
  /// prefix. Nothing has been written yet. What it sees may be rubbish, which is found out before
  /// collect(); so what decides where collect() reads is kept here.
  virtual bool agrees(Views /*slots*/) { return true; }
  virtual void collect(Views slots) = 0;

  /// For a stage of this many bytes (a multiple of 64 for each rank), equal on all ranks.
  virtual std::uint64_t rounds(std::size_t stage_bytes) = 0;
  virtual void fill(std::uint64_t round, std::byte* stage) = 0;
  virtual void use(std::uint64_t round, Views stages, std::byte* own) = 0;
  virtual bool hasFinish() const { return false; }
  virtual void finish(std::uint64_t /*round*/, Views /*stages*/) {}
};

/// Which of the team this rank is.
struct Seat {
  std::uint32_t place = 0;
  std::uint32_t size = 1;
};

struct Part {
  const std::byte* data = nullptr;
  std::size_t nbytes = 0;
};
struct Room {
  std::byte* data = nullptr;  ///< null: this rank does not take it
  std::size_t nbytes = 0;
};

/// all-reduce and reduce: sums in the order of the places, by kernels::reduce(). In rounds each
/// place sums its share of a chunk, straight from the others' memory.
class SumJob final : public Job {
 public:
  /// `out` may be `in`; null: the result is not taken here.
  SumJob(Seat seat, DataType dtype, ReduceOp op, const void* in, void* out, std::size_t count);

  std::size_t published() const override { return nbytes_; }
  std::size_t hopBytesMax(std::size_t slot_bytes) const override;
  void publish(std::byte* slot) const override;
  void collect(Views slots) override;
  std::uint64_t rounds(std::size_t stage_bytes) override;
  void fill(std::uint64_t round, std::byte* stage) override;
  void use(std::uint64_t round, Views stages, std::byte* own) override;
  bool hasFinish() const override { return true; }
  void finish(std::uint64_t round, Views stages) override;

 private:
  /// Of a chunk: where a place's share begins, and its size.
  struct Share {
    std::size_t begin = 0;
    std::size_t nbytes = 0;
  };
  std::size_t chunkBytes(std::uint64_t round) const;
  Share shareOf(std::uint32_t place, std::size_t chunk_bytes) const;

  const Seat seat_;
  const DataType dtype_;
  const ReduceOp op_;
  const std::byte* const in_;
  std::byte* const out_;
  const std::size_t nbytes_;
  std::size_t share_ = 0;
  std::size_t chunk_ = 0;
  std::vector<const std::byte*> sources_;
};

/// reduce-scatter: ins[p] goes into the sum that place p takes; nbytes equal on all ranks.
class SumShareJob final : public Job {
 public:
  /// `out` may be the memory of ins[place].
  SumShareJob(Seat seat, DataType dtype, ReduceOp op, std::vector<Part> ins, void* out);

  std::size_t published() const override;
  void publish(std::byte* slot) const override;
  void collect(Views slots) override;
  std::uint64_t rounds(std::size_t stage_bytes) override;
  void fill(std::uint64_t round, std::byte* stage) override;
  void use(std::uint64_t round, Views stages, std::byte* own) override;

 private:
  void sum(Views at, const std::byte* own, std::byte* out, std::size_t nbytes);

  const Seat seat_;
  const DataType dtype_;
  const ReduceOp op_;
  const std::vector<Part> ins_;
  std::byte* const out_;
  std::size_t piece_ = 0;
  std::vector<const std::byte*> sources_;
};

/// broadcast, all-gather, gather: each place has one part, and those that take it, all of it.
class SpreadJob final : public Job {
 public:
  /// outs[p].nbytes: what place p contributes, equal on all ranks; outs[place] may be `in`.
  SpreadJob(Seat seat, const void* in, std::vector<Room> outs);

  std::size_t published() const override { return outs_[seat_.place].nbytes; }
  void publish(std::byte* slot) const override;
  void collect(Views slots) override;
  std::uint64_t rounds(std::size_t stage_bytes) override;
  void fill(std::uint64_t round, std::byte* stage) override;
  void use(std::uint64_t round, Views stages, std::byte* own) override;

 private:
  void copyOwn() const;

  const Seat seat_;
  const std::byte* const in_;
  const std::vector<Room> outs_;
  std::size_t chunk_ = 0;
};

/// scatter, all-to-all: each place has a part for each other. What a place expects is compared with
/// what is meant for it.
class DealJob final : public Job {
 public:
  /// ins[p]: for place p; outs[p]: from place p.
  DealJob(Seat seat, std::vector<Part> ins, std::vector<Room> outs);

  std::size_t published() const override;
  void publish(std::byte* slot) const override;
  std::size_t prefix() const override { return 2 * sizeof(std::uint64_t) * seat_.size; }
  void publishPrefix(std::byte* slot) const override;
  bool agrees(Views slots) override;
  void collect(Views slots) override;
  std::uint64_t rounds(std::size_t stage_bytes) override;
  void fill(std::uint64_t round, std::byte* stage) override;
  void use(std::uint64_t round, Views stages, std::byte* own) override;

 private:
  void copyOwn() const;

  const Seat seat_;
  const std::vector<Part> ins_;
  const std::vector<Room> outs_;
  std::vector<std::size_t> begins_;  // of this place's part in each slot, by place
  std::size_t longest_ = 0;          // part of any two places
  std::size_t piece_ = 0;
};

}  // namespace reducer::local
