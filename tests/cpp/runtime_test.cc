#include "runtime/runtime.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <condition_variable>
#include <mutex>

#include "collective/group.h"

namespace reducer::runtime {
namespace {

TEST(Runtime, HostIdentityIsThatOfTheNamespace) {
  EXPECT_EQ(hostIdentity(), hostIdentity());
  EXPECT_NE(hostIdentity().find("/net:"), std::string::npos);
}

TEST(Addresses, LoopbackPeersAreReachedOverLoopback) {
  EXPECT_EQ(chooseBindHost("", "127.0.0.1").value(), "127.0.0.1");
  EXPECT_EQ(chooseBindHost("lo", "").value(), "127.0.0.1");
  EXPECT_EQ(chooseBindHost("127.0.0.1", "").value(), "127.0.0.1");
}

TEST(Addresses, AnUnknownInterfaceIsAnsweredWithThoseThatExist) {
  const auto host = chooseBindHost("nosuch0", "127.0.0.1");
  ASSERT_FALSE(host.ok());
  EXPECT_NE(host.status().message().find("'nosuch0'"), std::string::npos)
      << host.status().message();
  EXPECT_NE(host.status().message().find("lo (127.0.0.1)"), std::string::npos)
      << host.status().message();
}

TEST(Addresses, ServersAreResolvedAndTwinsRefused) {
  EXPECT_EQ(resolveServers({"127.0.0.1:7000", "127.0.0.1:7001"}).value(),
            (std::vector<std::string>{"127.0.0.1:7000", "127.0.0.1:7001"}));
  EXPECT_EQ(resolveServers({"[::1]:7000"}).value(), (std::vector<std::string>{"[::1]:7000"}));
  const auto twins = resolveServers({"127.0.0.1:7000", "127.0.0.1:7000"});
  ASSERT_FALSE(twins.ok());
  EXPECT_NE(twins.status().message().find("twice"), std::string::npos);
  const auto unknown = resolveServers({"no-such-host.invalid:7000"});
  ASSERT_FALSE(unknown.ok());
  EXPECT_NE(unknown.status().message().find("'no-such-host.invalid:7000' cannot be resolved"),
            std::string::npos)
      << unknown.status().message();
}

TEST(Runtime, IsSharedWhileSomebodyHoldsItAndMadeAgainAfterwards) {
  auto first = Runtime::acquire({}).value();
  EXPECT_EQ(Runtime::acquire({}).value(), first);
  const std::string address = first->address();
  EXPECT_NE(address.find("127.0.0.1:"), std::string::npos);
  first.reset();
  auto second = Runtime::acquire({}).value();
  EXPECT_FALSE(second->address().empty());
}

TEST(Runtime, AForkedChildIsToldAndCanExit) {
  auto runtime = Runtime::acquire({}).value();
  const pid_t child = fork();
  if (child == 0) {
    const auto again = Runtime::acquire({});
    const bool told = !again.ok() && again.status().message().find("forked") != std::string::npos;
    runtime.reset();  // must not wait for threads that are not here
    _exit(told ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

TEST(Runtime, AGroupOfOneWorksOverItsOwnReducer) {
  const auto runtime = Runtime::acquire({}).value();
  collective::GroupConfig config;
  config.job = "0123456789abcdef";
  config.workers = {runtime->address()};
  config.host = hostLabel();
  const auto group =
      collective::Group::create(config, runtime->transport(), runtime->server()).value();
  std::vector<float> data(100'000, 2.0f);
  std::mutex mutex;
  std::condition_variable condition;
  bool done = false;
  Status result;
  group->allReduce(data.data(), data.data(), data.size(), DataType::kFloat32, ReduceOp::kSum, {},
                   [&](const Status& status) {
                     const std::lock_guard lock(mutex);
                     result = status;
                     done = true;
                     condition.notify_all();
                   });
  std::unique_lock lock(mutex);
  ASSERT_TRUE(condition.wait_for(lock, std::chrono::seconds(10), [&] { return done; }));
  EXPECT_TRUE(result.ok()) << result.message();
  EXPECT_EQ(data, std::vector<float>(100'000, 2.0f));
  group->close();
  EXPECT_TRUE(group->waitClosed(std::chrono::seconds(5)));
}

}  // namespace
}  // namespace reducer::runtime
