// How the ranks of a host find each other, wait for each other, and notice each other's end.
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstring>
#include <filesystem>
#include <latch>

#include "local_ranks.h"

namespace reducer::local {
namespace {

bool attachNow(Team& team) {
  TestWatch watch(20s);
  return team.attach(watch).ok() && team.attached();
}

std::size_t openDescriptors() {
  std::size_t count = 0;
  for ([[maybe_unused]] const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    ++count;
  }
  return count;
}

TEST(Team, RanksSeeEachOthersMemory) {
  for (const std::uint32_t n : {1u, 2u, 3u, 8u}) {
    const std::string name = uniqueName();
    asThreads(n, [&](std::uint32_t r) {
      Team team(teamConfig(name, n, r));
      ASSERT_TRUE(attachNow(team)) << team.refusal().message();
      std::memcpy(team.area(r), &r, sizeof r);
      ASSERT_NE(team.arrive(0), Gate::Turn::kFailed);
      TestWatch watch(20s);
      ASSERT_TRUE(team.gate().wait(0, team.waiter(), watch).ok());
      ASSERT_EQ(team.gate().turnOf(0), Gate::Turn::kComplete);
      for (std::uint32_t other = 0; other < n; ++other) {
        std::uint32_t seen = 99;
        std::memcpy(&seen, team.area(other), sizeof seen);
        EXPECT_EQ(seen, other);
        EXPECT_EQ(team.name(other).rfind("rank " + std::to_string(other) + " (here:", 0), 0u);
      }
      // Nobody leaves before all have looked.
      ASSERT_NE(team.arrive(1), Gate::Turn::kFailed);
      ASSERT_TRUE(team.gate().wait(1, team.waiter(), watch).ok());
    });
  }
}

TEST(Team, NothingIsLeftBehind) {
  const std::size_t before = openDescriptors();
  const std::string name = uniqueName();
  asThreads(3, [&](std::uint32_t r) {
    Team team(teamConfig(name, 3, r));
    ASSERT_TRUE(attachNow(team));
  });
  EXPECT_EQ(openDescriptors(), before);
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    EXPECT_EQ(entry.path().string().find("reducer"), std::string::npos) << entry.path();
  }
}

TEST(Team, ALateRankIsWaitedForAndMissed) {
  const std::string name = uniqueName();
  Team first(teamConfig(name, 3, 0));
  TestWatch brief(50ms);
  EXPECT_EQ(first.attach(brief).code(), Code::kTimeout);
  EXPECT_EQ(first.missing(), (std::vector<std::uint32_t>{1, 2}));
  asThreads(2, [&](std::uint32_t r) {
    if (r == 0) {
      EXPECT_TRUE(attachNow(first));
      return;
    }
    Team second(teamConfig(name, 3, 1));
    Team third(teamConfig(name, 3, 2));
    std::thread other([&] { EXPECT_TRUE(attachNow(third)); });
    EXPECT_TRUE(attachNow(second));
    other.join();
  });
}

TEST(Team, TheOthersAreToldWhoIsMissing) {
  const std::string name = uniqueName();
  std::latch both_looked(2);
  asThreads(2, [&](std::uint32_t r) {
    Team team(teamConfig(name, 3, r));
    TestWatch brief(200ms);
    EXPECT_EQ(team.attach(brief).code(), Code::kTimeout);
    EXPECT_EQ(team.missing(), (std::vector<std::uint32_t>{2}));
    // The first of them to leave would end the other's wait with another word.
    both_looked.arrive_and_wait();
  });
}

TEST(Team, APlaceWithoutTheFirstIsToldSo) {
  Team second(teamConfig(uniqueName(), 2, 1));
  TestWatch brief(50ms);
  EXPECT_EQ(second.attach(brief).code(), Code::kTimeout);
  EXPECT_EQ(second.missing(), (std::vector<std::uint32_t>{0}));
}

// Where one rank cannot, none does, and all know the same reason.
TEST(Team, ARefusalIsEverybodys) {
  for (const std::uint32_t poor : {0u, 1u}) {
    const std::string name = uniqueName();
    Children children(3, [&](std::uint32_t r) {
      Team team(teamConfig(name, 3, r));
      if (r == poor && r == 0) {  // no memory
        ::signal(SIGXFSZ, SIG_IGN);
        const rlimit limit{4096, 4096};
        setrlimit(RLIMIT_FSIZE, &limit);
      } else if (r == poor) {  // the socket still fits, the memory's descriptor does not
        const int lowest = dup(0);
        ::close(lowest);
        const rlimit limit{static_cast<rlim_t>(lowest) + 1, static_cast<rlim_t>(lowest) + 1};
        setrlimit(RLIMIT_NOFILE, &limit);
      }
      TestWatch watch(20s);
      const Status status = team.attach(watch);
      return status.ok() && !team.attached() && !team.refusal().ok();
    });
    for (std::uint32_t r = 0; r < 3; ++r) EXPECT_EQ(children.join(r), 0) << r << " of " << poor;
  }
}

// The others do not find it, but its own calls need not wait.
TEST(Team, WhoCannotListenConcludesAtOnce) {
  const std::string name = uniqueName();
  Team holder(teamConfig(name, 2, 0));
  Team team(teamConfig(name, 2, 0));
  TestWatch watch(20s);
  const TimePoint begun = Clock::now();
  EXPECT_TRUE(team.attach(watch).ok());
  EXPECT_LT(Clock::now() - begun, 5s);
  EXPECT_FALSE(team.attached());
  EXPECT_EQ(team.refusal().message(), "a local socket cannot be opened: Address already in use");
}

/// From here on this process has `more` descriptors left.
void leaveDescriptors(rlim_t more) {
  const int lowest = dup(0);
  ::close(lowest);
  rlimit limit{};
  getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = static_cast<rlim_t>(lowest) + more;
  setrlimit(RLIMIT_NOFILE, &limit);
}

TEST(Team, WhoCannotLetAnybodyInRefusesAllOnceItCan) {
  const std::string name = uniqueName();
  Children children(2, [&](std::uint32_t r) {
    Team team(teamConfig(name, 2, r));
    if (r == 0) {
      leaveDescriptors(2);  // for the memory
      std::this_thread::sleep_for(100ms);
      TestWatch brief(300ms);
      if (team.attach(brief).code() != Code::kTimeout) return false;
      leaveDescriptors(10);
    }
    TestWatch watch(20s);
    const std::string text = "a rank of this host cannot be let in: Too many open files";
    return team.attach(watch).ok() && !team.attached() && team.refusal().message() == text;
  });
  for (std::uint32_t r = 0; r < 2; ++r) EXPECT_EQ(children.join(r), 0) << r;
}

TEST(Team, WhatKeepsARankFromKnockingIsKnown) {
  Children child(1, [&](std::uint32_t) {
    Team team(teamConfig(uniqueName(), 2, 1));
    TestWatch brief(50ms);
    if (team.attach(brief).code() != Code::kTimeout || !team.trouble().empty()) return false;
    leaveDescriptors(0);
    TestWatch again(50ms);
    return team.attach(again).code() == Code::kTimeout &&
           team.trouble() == "a local socket cannot be connected: Too many open files";
  });
  EXPECT_EQ(child.join(0), 0);
}

TEST(Team, AreasOfDifferentSizesAreRefused) {
  const std::string name = uniqueName();
  asThreads(3, [&](std::uint32_t r) {
    Team team(teamConfig(name, 3, r, r == 2 ? 131072 : 65536));
    TestWatch watch(20s);
    EXPECT_TRUE(team.attach(watch).ok());
    EXPECT_FALSE(team.attached());
    EXPECT_EQ(team.refusal().code(), Code::kMismatch);
    EXPECT_NE(team.refusal().message().find("different REDUCER_CHUNK_BYTES: place 0 shares"),
              std::string::npos)
        << team.refusal().message();
  });
}

TEST(Team, AStrangerAtTheDoorHarmsNobody) {
  const std::string name = uniqueName();
  Team first(teamConfig(name, 2, 0));
  std::vector<OwnFd> strangers;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  const std::string path = "reducer/" + name;
  std::memcpy(address.sun_path + 1, path.data(), path.size());
  for (int i = 0; i < 2; ++i) {
    OwnFd stranger(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0));
    ASSERT_EQ(connect(stranger.get(), reinterpret_cast<const sockaddr*>(&address),
                      static_cast<socklen_t>(sizeof(sa_family_t) + 1 + path.size())),
              0);
    if (i == 1) {
      ASSERT_EQ(::send(stranger.get(), "rubbish", 7, MSG_NOSIGNAL), 7);
    }
    strangers.push_back(std::move(stranger));
  }
  std::thread other([&] {
    Team second(teamConfig(name, 2, 1));
    EXPECT_TRUE(attachNow(second));
  });
  EXPECT_TRUE(attachNow(first));
  other.join();
}

TEST(Team, OneThatLeavesAndOneThatDiesAreTold) {
  for (const bool dies : {false, true}) {
    const std::string name = uniqueName();
    Children child(1, [&](std::uint32_t) {
      Team team(teamConfig(name, 2, 1));
      if (!attachNow(team)) return false;
      // A process that was forked from it does not keep it alive.
      const pid_t grandchild = fork();
      if (grandchild == 0) {
        sleep(5);
        _exit(0);
      }
      if (dies) raise(SIGKILL);
      return true;
    });
    Team team(teamConfig(name, 2, 0));
    ASSERT_TRUE(attachNow(team));
    EXPECT_NE(team.arrive(0), Gate::Turn::kFailed);
    TestWatch watch(20s, &team);
    const Status status = team.gate().wait(0, team.waiter(), watch);
    EXPECT_EQ(status.code(), Code::kUnavailable);
    const auto gone = team.gone();
    ASSERT_TRUE(gone);
    EXPECT_EQ(gone->died, dies);
    EXPECT_EQ(child.join(0), dies ? 1000 + SIGKILL : 0);
  }
}

TEST(Gate, GivingUpAndArrivingLastNeverDisagree) {
  const std::string name = uniqueName();
  constexpr std::uint32_t kOperations = 3000;
  constexpr std::uint32_t n = 3;
  std::vector<std::vector<char>> complete(n, std::vector<char>(kOperations));
  asThreads(n, [&](std::uint32_t r) {
    Team team(teamConfig(name, n, r));
    ASSERT_TRUE(attachNow(team));
    for (std::uint32_t s = 0; s < kOperations; ++s) {
      Gate::Turn turn = team.arrive(s);
      // Rank 0 is impatient in every third operation.
      if (turn == Gate::Turn::kWaiting && r == 0 && s % 3 == 0) {
        team.giveUp(s, Status(Code::kTimeout, "rank 0 gave up " + std::to_string(s)));
        turn = team.gate().turnOf(s);
      }
      if (turn == Gate::Turn::kWaiting) {
        TestWatch watch(20s);
        ASSERT_TRUE(team.gate().wait(s, team.waiter(), watch).ok());
        turn = team.gate().turnOf(s);
      }
      ASSERT_NE(turn, Gate::Turn::kWaiting);
      complete[r][s] = turn == Gate::Turn::kComplete;
      if (turn == Gate::Turn::kFailed && r == 0) {
        EXPECT_EQ(team.givenUp(s).message(), "rank 0 gave up " + std::to_string(s));
      }
    }
  });
  EXPECT_EQ(complete[0], complete[1]);
  EXPECT_EQ(complete[0], complete[2]);
}

TEST(Gate, GivingUpBreaksOnlyWhatIsBehindTheGate) {
  Team team(teamConfig(uniqueName(), 1, 0));
  ASSERT_TRUE(attachNow(team));
  const Status why(Code::kTimeout, "too late");
  ASSERT_EQ(team.arrive(0), Gate::Turn::kComplete);
  team.giveUpMeeting(0, why);  // a timeout that raced with the last arrival
  EXPECT_FALSE(team.broken(0));
  team.giveUp(0, why);
  EXPECT_TRUE(team.broken(0));
  team.giveUp(1, why);
  team.giveUp(1, why);  // nobody is in it: those who are still in the one before learn of that
  EXPECT_TRUE(team.broken(0));
  EXPECT_FALSE(team.broken(1));
}

TEST(Gate, ARankThatWasAwayLearnsWhatWasGivenUp) {
  const std::string name = uniqueName();
  asThreads(2, [&](std::uint32_t r) {
    Team team(teamConfig(name, 2, r));
    std::uint32_t number = 0;
    if (r == 0) {  // gave up its first two operations before it was attached
      team.giveUp(number++, Status(Code::kTimeout, "too late"));
      team.giveUp(number++, Status(Code::kTimeout, "too late again"));
    }
    ASSERT_TRUE(attachNow(team));
    for (; number < 3; ++number) {
      TestWatch watch(20s);
      Gate::Turn turn = team.arrive(number);
      if (turn == Gate::Turn::kWaiting) {
        ASSERT_TRUE(team.gate().wait(number, team.waiter(), watch).ok());
        turn = team.gate().turnOf(number);
      }
      EXPECT_EQ(turn, number < 2 ? Gate::Turn::kFailed : Gate::Turn::kComplete) << number;
      if (number < 2) {
        EXPECT_EQ(team.givenUp(number).message(), "too late");
      }
    }
  });
}

TEST(Counter, IsWaitedForAcrossItsWrap) {
  const std::string name = uniqueName();
  asThreads(2, [&](std::uint32_t r) {
    Team team(teamConfig(name, 2, r));
    ASSERT_TRUE(attachNow(team));
    const std::uint32_t first = 0xFFFF'FFF0u;
    Counter& mine = team.counter(r, 3);
    Counter& other = team.counter(1 - r, 3);
    mine.publish(first);
    TestWatch watch(20s);
    // From zero the first step is no small one; both see it before they go on.
    while (other.value.load() == 0) std::this_thread::yield();
    for (std::uint32_t i = 1; i <= 2000; ++i) {
      mine.publish(first + i);
      ASSERT_TRUE(other.wait(first + i, team.waiter(), watch).ok());
    }
  });
}

TEST(Counter, ADeadlineEndsTheWait) {
  Team team(teamConfig(uniqueName(), 1, 0));
  ASSERT_TRUE(attachNow(team));
  TestWatch watch(30ms);
  const TimePoint begun = Clock::now();
  EXPECT_EQ(team.counter(0, 0).wait(1, team.waiter(), watch).code(), Code::kTimeout);
  EXPECT_GE(Clock::now() - begun, 25ms);
  EXPECT_LT(Clock::now() - begun, 5s);
}

}  // namespace
}  // namespace reducer::local
