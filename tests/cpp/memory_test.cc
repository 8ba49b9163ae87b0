#include "common/memory.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <thread>
#include <vector>

namespace reducer {
namespace {

constexpr std::uint64_t kLimit = 1000;

class MemoryTest : public testing::Test {
 protected:
  std::shared_ptr<MemoryAccount> open(std::uint64_t promise) {
    return MemoryAccount::open(limit_, promise);
  }
  const std::shared_ptr<MemoryLimit> limit_ = std::make_shared<MemoryLimit>(kLimit);
};

TEST_F(MemoryTest, APromiseIsThereWhateverOthersHold) {
  const auto greedy = open(100);
  const auto modest = open(400);
  EXPECT_EQ(limit_->taken(), 500U);
  EXPECT_TRUE(greedy->take(600));
  EXPECT_FALSE(greedy->take(1)) << "all that is left is promised to the other";
  EXPECT_EQ(limit_->taken(), kLimit);
  EXPECT_TRUE(modest->take(400));
  EXPECT_FALSE(modest->take(1));
  EXPECT_EQ(limit_->taken(), kLimit);
  greedy->giveBack(300);
  EXPECT_TRUE(modest->take(300));
  EXPECT_EQ(limit_->held(), kLimit);
  greedy->giveBack(300);
  modest->giveBack(700);
  EXPECT_EQ(limit_->taken(), 500U);
  EXPECT_EQ(limit_->held(), 0U);
  EXPECT_EQ(limit_->heldMax(), kLimit);
}

TEST_F(MemoryTest, NoPromiseBeyondWhatIsFree) {
  const auto first = open(600);
  EXPECT_EQ(open(401), nullptr);
  EXPECT_TRUE(first->take(700));
  EXPECT_EQ(open(301), nullptr) << "what is held beyond a promise is taken, too";
  EXPECT_NE(open(300), nullptr);
}

TEST_F(MemoryTest, AGroupThatIsGoneHoldsWhatIsOnItsWay) {
  const auto gone = open(500);
  EXPECT_TRUE(gone->take(200));
  gone->close();
  EXPECT_EQ(limit_->taken(), 200U);
  EXPECT_EQ(limit_->held(), 200U);
  gone->giveBack(150);
  EXPECT_EQ(limit_->taken(), 50U);
  gone->giveBack(50);
  EXPECT_EQ(limit_->taken(), 0U);

  const auto beyond = open(500);
  EXPECT_TRUE(beyond->take(700));
  beyond->close();
  EXPECT_EQ(limit_->taken(), 700U);
  beyond->giveBack(700);
  EXPECT_EQ(limit_->taken(), 0U);
}

TEST_F(MemoryTest, AChargeLastsAsLongAsThePayload) {
  const auto account = open(0);
  std::vector<std::byte> bytes(64);
  std::memset(bytes.data(), 7, bytes.size());
  const auto owner = std::make_shared<int>(1);
  bool ok = false;
  Payload payload = charged(Payload(Bytes(bytes), owner), Charge::ifPossible(account, 64, &ok), 32);
  ASSERT_TRUE(ok);
  EXPECT_EQ(owner.use_count(), 2) << "too large to be copied";
  Payload another = payload;
  payload = {};
  EXPECT_EQ(limit_->held(), 64U);
  another = charged(another, Charge(account, 10), 64);
  EXPECT_EQ(owner.use_count(), 1) << "small enough to be copied";
  EXPECT_EQ(limit_->held(), 10U);
  std::vector<std::byte> copy(64);
  another.copyTo(copy.data());
  EXPECT_EQ(copy, bytes);
  another = {};
  EXPECT_EQ(limit_->held(), 0U);
  (void)Charge::ifPossible(account, kLimit + 1, &ok);
  EXPECT_FALSE(ok);
  const Payload nothing = charged({}, Charge(account, 5));
  EXPECT_EQ(nothing.nbytes(), 0U);
  EXPECT_EQ(limit_->held(), 5U);
}

TEST_F(MemoryTest, ThreadsAddUpAndNeverPassTheLimit) {
  constexpr int kThreads = 4;
  const std::vector<std::shared_ptr<MemoryAccount>> accounts{open(100), open(300), open(0)};
  std::vector<std::thread> threads;
  std::atomic<std::uint64_t> refusals{0};
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 20000; ++i) {
        std::vector<Charge> held;
        for (int k = 0; k < 4; ++k) {
          bool ok = false;
          held.push_back(Charge::ifPossible(accounts[random() % 3], random() % 200, &ok));
          if (!ok) ++refusals;
          EXPECT_LE(limit_->taken(), kLimit + kThreads * 200)
              << "but for what is given back at once";
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_GT(refusals, 0U);
  EXPECT_EQ(limit_->held(), 0U);
  EXPECT_EQ(limit_->taken(), 400U);
  for (const auto& account : accounts) account->close();
  EXPECT_EQ(limit_->taken(), 0U);
}

}  // namespace
}  // namespace reducer
