// The collectives in shared memory: their bits, and what becomes of them when a rank differs, is
// late, or dies.
#include <cstring>
#include <random>

#include "kernels/reduce.h"
#include "local/exchange.h"
#include "local_ranks.h"

namespace reducer::local {
namespace {

using Buffer = std::vector<std::byte>;

/// A member of a team with its exchange, attached.
struct Member {
  Member(const std::string& name, std::uint32_t n, std::uint32_t place, std::size_t stage_bytes)
      : layout(Exchange::Layout::of(n, stage_bytes)),
        team(teamConfig(name, n, place, layout.areaBytes())),
        exchange(team, layout) {
    TestWatch watch(20s);
    EXPECT_TRUE(team.attach(watch).ok() && team.attached());
  }
  Status run(Job& job, CallWords call = {}, Duration patience = 20s) {
    TestWatch watch(patience, &team);
    return exchange.run(number++, call, job, watch);
  }
  Seat seat() const { return {team.place(), team.size()}; }

  const Exchange::Layout layout;
  Team team;
  Exchange exchange;
  std::uint32_t number = 0;
};

Buffer randomBytes(std::size_t nbytes, std::uint32_t seed) {
  std::mt19937 random(seed);
  Buffer bytes(nbytes);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  return bytes;
}

Buffer sumOf(DataType dtype, ReduceOp op, const std::vector<Buffer>& inputs) {
  std::vector<Payload> payloads;
  for (const Buffer& input : inputs) payloads.emplace_back(Bytes(input), nullptr);
  Buffer sum(inputs[0].size());
  if (!sum.empty()) {
    kernels::reduceScalar(dtype, op, payloads, sum.data(), sum.size() / sizeOf(dtype));
  }
  return sum;
}

std::vector<ReduceOp> allOps() {
  return {ReduceOp::kSum,    ReduceOp::kProduct, ReduceOp::kMin,    ReduceOp::kMax,
          ReduceOp::kBitAnd, ReduceOp::kBitOr,   ReduceOp::kBitXor, ReduceOp::kAvg};
}

struct Shape {
  std::uint32_t n;
  std::size_t stage_bytes;
  std::size_t count;
};

class Sums : public testing::TestWithParam<Shape> {};

TEST_P(Sums, HaveTheBitsOfRankOrder) {
  const auto [n, stage_bytes, count] = GetParam();
  const std::string name = uniqueName();
  asThreads(n, [&, n = n, stage_bytes = stage_bytes, count = count](std::uint32_t r) {
    Member member(name, n, r, stage_bytes);
    std::uint32_t seed = 0;
    for (int type = 1; type <= static_cast<int>(kLastDataType); ++type) {
      const auto dtype = static_cast<DataType>(type);
      for (const ReduceOp op : allOps()) {
        if (!supports(op, dtype)) continue;
        seed += 100;
        std::vector<Buffer> inputs;
        for (std::uint32_t p = 0; p < n; ++p) {
          inputs.push_back(randomBytes(count * sizeOf(dtype), seed + p));
        }
        const Buffer expected = sumOf(dtype, op, inputs);
        Buffer data = inputs[r];  // in place
        SumJob all(member.seat(), dtype, op, data.data(), data.data(), count);
        ASSERT_TRUE(member.run(all).ok());
        ASSERT_EQ(data, expected) << nameOf(dtype) << " " << nameOf(op);
        const std::uint32_t root = seed / 100 % n;
        Buffer out(data.size());
        SumJob one(member.seat(), dtype, op, inputs[r].data(), r == root ? out.data() : nullptr,
                   count);
        ASSERT_TRUE(member.run(one).ok());
        if (r == root) {
          ASSERT_EQ(out, expected) << nameOf(dtype) << " " << nameOf(op);
        }
      }
    }
  });
}

INSTANTIATE_TEST_SUITE_P(Shapes, Sums,
                         testing::Values(Shape{1, 0, 17}, Shape{2, 0, 0}, Shape{2, 0, 1},
                                         Shape{2, 256, 1001}, Shape{3, 0, 1023}, Shape{3, 192, 333},
                                         Shape{3, 1, 100}, Shape{8, 512, 257}, Shape{5, 4096, 4999},
                                         Shape{2, 0, 20'011}));

TEST(Exchange, MovesEveryPart) {
  for (const std::size_t stage_bytes : {std::size_t{0}, std::size_t{1}, std::size_t{512}}) {
    for (const std::uint32_t n : {1u, 2u, 3u, 8u}) {
      const std::string name = uniqueName();
      asThreads(n, [&](std::uint32_t r) {
        Member member(name, n, r, stage_bytes);
        // What `from` has for `to`; sizes differ, and some are 0.
        const auto part = [n](std::uint32_t from, std::uint32_t to) {
          return randomBytes((from * n + to) % 4 * 333, from * 100 + to);
        };
        std::vector<Buffer> mine, got(n), gathered(n);
        std::vector<Part> ins;
        std::vector<Room> outs, all;
        for (std::uint32_t p = 0; p < n; ++p) {
          mine.push_back(part(r, p));
          got[p].resize(part(p, r).size());
          gathered[p].resize(part(p, 0).size());
        }
        for (std::uint32_t p = 0; p < n; ++p) {
          ins.push_back({mine[p].data(), mine[p].size()});
          outs.push_back({got[p].data(), got[p].size()});
          all.push_back({gathered[p].data(), gathered[p].size()});
        }
        DealJob deal(member.seat(), ins, outs);
        ASSERT_TRUE(member.run(deal).ok());
        SpreadJob spread(member.seat(), mine[0].data(), all);
        ASSERT_TRUE(member.run(spread).ok());
        for (std::uint32_t p = 0; p < n; ++p) {
          EXPECT_EQ(got[p], part(p, r));
          EXPECT_EQ(gathered[p], part(p, 0));
        }
      });
    }
  }
}

TEST(Exchange, SumsWhatEachRankTakes) {
  for (const std::size_t stage_bytes : {std::size_t{0}, std::size_t{1}, std::size_t{512}}) {
    const std::uint32_t n = 3;
    const std::string name = uniqueName();
    asThreads(n, [&](std::uint32_t r) {
      Member member(name, n, r, stage_bytes);
      const auto part = [](std::uint32_t from, std::uint32_t to) {
        return randomBytes(to * 400 * sizeof(float), from * 100 + to);
      };
      std::vector<Buffer> mine;
      std::vector<Part> ins;
      for (std::uint32_t p = 0; p < n; ++p) mine.push_back(part(r, p));
      for (std::uint32_t p = 0; p < n; ++p) ins.push_back({mine[p].data(), mine[p].size()});
      SumShareJob job(member.seat(), DataType::kFloat32, ReduceOp::kAvg, ins, mine[r].data());
      ASSERT_TRUE(member.run(job).ok());
      EXPECT_EQ(mine[r],
                sumOf(DataType::kFloat32, ReduceOp::kAvg, {part(0, r), part(1, r), part(2, r)}));
    });
  }
}

TEST(Exchange, DifferentCallsChangeNothingAndTheNextWorks) {
  const std::string name = uniqueName();
  asThreads(3, [&](std::uint32_t r) {
    Member member(name, 3, r, 256);
    for (const std::size_t count : {std::size_t{4}, std::size_t{4000}}) {
      std::vector<float> data(count, static_cast<float>(r + 1));
      SumJob job(member.seat(), DataType::kFloat32, ReduceOp::kSum, data.data(), data.data(),
                 count);
      const std::uint32_t number = member.number;
      EXPECT_EQ(member.run(job, {1, r == 2 ? 7u : 0u}).code(), Code::kMismatch);
      EXPECT_EQ(data, std::vector<float>(count, static_cast<float>(r + 1)));
      EXPECT_EQ(member.exchange.callOf(2, number)->at(1), 7u);
      SumJob again(member.seat(), DataType::kFloat32, ReduceOp::kSum, data.data(), data.data(),
                   count);
      ASSERT_TRUE(member.run(again).ok());
      EXPECT_EQ(data, std::vector<float>(count, 6));
    }
  });
}

TEST(Exchange, PartsOfDifferentSizesAreAMismatch) {
  const std::string name = uniqueName();
  asThreads(2, [&](std::uint32_t r) {
    Member member(name, 2, r, 0);
    Buffer in(64), out(64);
    // Rank 1 expects more than rank 0 sends.
    DealJob job(member.seat(), {{in.data(), 8}, {in.data(), 8}},
                {{out.data(), r == 1 ? 16u : 8u}, {out.data(), 8}});
    EXPECT_EQ(member.run(job).code(), Code::kMismatch);
  });
}

TEST(Exchange, NumbersWrap) {
  const std::string name = uniqueName();
  asThreads(2, [&](std::uint32_t r) {
    Member member(name, 2, r, 256);
    member.number = 0xFFFF'FFFEu;
    if (r == 0) member.team.gate().word.store(std::uint64_t{member.number} << 32);
    while (member.team.gate().number() == 0) std::this_thread::sleep_for(1ms);
    for (int i = 0; i < 4; ++i) {  // each in rounds
      std::vector<float> data(4000, 1);
      SumJob job(member.seat(), DataType::kFloat32, ReduceOp::kSum, data.data(), data.data(), 4000);
      const std::uint32_t number = member.number;
      EXPECT_FALSE(member.exchange.callOf(r, number));
      ASSERT_TRUE(member.run(job, {7}).ok()) << number;
      EXPECT_EQ(data, std::vector<float>(4000, 2));
      EXPECT_EQ(member.exchange.callOf(r, number)->at(0), 7u);
    }
  });
}

TEST(Exchange, ALateRankIsToldAndTheNextWorks) {
  const std::string name = uniqueName();
  std::atomic<bool> given_up{false};
  asThreads(3, [&](std::uint32_t r) {
    Member member(name, 3, r, 256);
    if (r == 2) {
      while (!given_up) std::this_thread::sleep_for(1ms);
    }
    std::vector<float> data(500, 1);
    SumJob job(member.seat(), DataType::kFloat32, ReduceOp::kSum, data.data(), data.data(), 500);
    const Status status = member.run(job, {}, r == 0 ? Duration(40ms) : Duration(20s));
    EXPECT_EQ(status.code(), Code::kTimeout);
    EXPECT_EQ(status.message(), "the test's patience is over");
    if (r == 0) given_up = true;
    EXPECT_EQ(data, std::vector<float>(500, 1));
    SumJob again(member.seat(), DataType::kFloat32, ReduceOp::kSum, data.data(), data.data(), 500);
    ASSERT_TRUE(member.run(again).ok());
    EXPECT_EQ(data, std::vector<float>(500, 3));
  });
}

/// A deal whose rank is late between two steps.
class LateDeal final : public Job {
 public:
  enum class When { kAgrees, kCollect };
  LateDeal(DealJob& deal, When when, std::function<void()> wait)
      : deal_(deal), when_(when), wait_(std::move(wait)) {}
  std::size_t published() const override { return deal_.published(); }
  void publish(std::byte* slot) const override { deal_.publish(slot); }
  std::size_t prefix() const override { return deal_.prefix(); }
  void publishPrefix(std::byte* slot) const override { deal_.publishPrefix(slot); }
  bool agrees(Views slots) override {
    if (when_ == When::kAgrees) wait_();
    return deal_.agrees(slots);
  }
  void collect(Views slots) override {
    if (when_ == When::kCollect) wait_();
    deal_.collect(slots);
  }
  std::uint64_t rounds(std::size_t stage_bytes) override { return deal_.rounds(stage_bytes); }
  void fill(std::uint64_t round, std::byte* stage) override { deal_.fill(round, stage); }
  void use(std::uint64_t round, Views stages, std::byte* own) override {
    deal_.use(round, stages, own);
  }

 private:
  DealJob& deal_;
  const When when_;
  const std::function<void()> wait_;
};

TEST(Exchange, ASlotThatIsUsedAgainIsNeverTakenForTheOldOne) {
  for (const auto when : {LateDeal::When::kAgrees, LateDeal::When::kCollect}) {
    const std::string name = uniqueName();
    asThreads(2, [&](std::uint32_t r) {
      Member member(name, 2, r, 0);
      Buffer in(8), out(16);
      const std::vector<Part> ins(2, {in.data(), in.size()});
      const std::vector<Room> outs = {{out.data(), 8}, {out.data() + 8, 8}};
      DealJob deal(member.seat(), ins, outs);
      if (r == 0) {  // does the first, gives the second up, and shows sizes beyond all memory
        ASSERT_TRUE(member.run(deal).ok());
        DealJob second(member.seat(), ins, outs);
        ASSERT_EQ(member.run(second, {}, 30ms).code(), Code::kTimeout);
        const std::vector<Part> huge(2, {in.data(), std::size_t{1} << 40});
        DealJob third(member.seat(), huge, outs);
        EXPECT_EQ(member.run(third).code(), Code::kMismatch);
        return;
      }
      LateDeal late(deal, when, [&] {
        while (!member.exchange.callOf(0, 2)) std::this_thread::sleep_for(1ms);
      });
      for (int i = 0; i < 2; ++i) {  // and finds the second given up
        const Status status = i == 0 ? member.run(late) : member.run(deal);
        EXPECT_EQ(status.code(), Code::kTimeout);
        EXPECT_EQ(status.message(), "the test's patience is over");
      }
      DealJob third(member.seat(), ins, outs);
      EXPECT_EQ(member.run(third).code(), Code::kMismatch);
    });
  }
}

/// Runs operations of many rounds for ever, as process `r` of n; the end's status by its code.
int sumForEver(const std::string& name, std::uint32_t n, std::uint32_t r, int kind) {
  Member member(name, n, r, 64 * n);
  constexpr std::size_t kCount = 3000;
  std::vector<float> data(kCount * n), out(kCount * n);
  while (true) {
    std::vector<Part> ins;
    std::vector<Room> outs;
    for (std::uint32_t p = 0; p < n; ++p) {
      ins.push_back({reinterpret_cast<std::byte*>(data.data() + p * kCount), kCount * 4});
      outs.push_back({reinterpret_cast<std::byte*>(out.data() + p * kCount), kCount * 4});
    }
    std::unique_ptr<Job> job;
    if (kind == 0) {
      job = std::make_unique<SumJob>(member.seat(), DataType::kFloat32, ReduceOp::kSum, data.data(),
                                     data.data(), data.size());
    } else if (kind == 1) {
      job = std::make_unique<SumShareJob>(member.seat(), DataType::kFloat32, ReduceOp::kSum, ins,
                                          out.data());
    } else if (kind == 2) {
      job = std::make_unique<SpreadJob>(member.seat(), data.data(), outs);
    } else {
      job = std::make_unique<DealJob>(member.seat(), ins, outs);
    }
    const Status status = member.run(*job);
    if (!status.ok()) return static_cast<int>(status.code());
  }
}

TEST(Exchange, AnyRanksDeathEndsEveryCollective) {
  for (int kind = 0; kind < 4; ++kind) {
    for (const std::uint32_t victim : {0u, 2u}) {
      const std::string name = uniqueName();
      Children children(3, [&](std::uint32_t r) {
        return sumForEver(name, 3, r, kind) == static_cast<int>(Code::kUnavailable);
      });
      std::this_thread::sleep_for(50ms);
      children.signal(victim, SIGKILL);
      for (std::uint32_t r = 0; r < 3; ++r) {
        EXPECT_EQ(children.join(r), r == victim ? 1000 + SIGKILL : 0) << kind << " " << r;
      }
    }
  }
}

TEST(Exchange, AStoppedRankIsATimeoutAndComesBack) {
  const std::string name = uniqueName();
  Children children(2, [&](std::uint32_t r) {
    Member member(name, 2, r, 128);
    std::vector<float> data(4000), out(4000);
    int timeouts = 0;
    // Until one was given up by rank 0, and three more have worked.
    for (int good = 0; good < 3;) {
      SumJob job(member.seat(), DataType::kFloat32, ReduceOp::kSum, data.data(), out.data(), 4000);
      const Status status = member.run(job, {}, r == 0 ? Duration(100ms) : Duration(20s));
      if (status.code() == Code::kTimeout) ++timeouts;
      if (!status.ok() && status.code() != Code::kTimeout) return false;
      good = status.ok() && timeouts > 0 ? good + 1 : 0;
    }
    return true;
  });
  std::this_thread::sleep_for(50ms);
  children.signal(1, SIGSTOP);
  std::this_thread::sleep_for(400ms);
  children.signal(1, SIGCONT);
  // One of them is through first, and leaves.
  const int first = children.join(0);
  const int second = children.join(1);
  EXPECT_TRUE(first == 0 || second == 0);
}

}  // namespace
}  // namespace reducer::local
