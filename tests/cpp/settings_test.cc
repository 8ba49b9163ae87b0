#include "collective/settings.h"

#include <gtest/gtest.h>

namespace reducer::collective {
namespace {

TEST(Settings, TransportsByName) {
  EXPECT_EQ(parseCarrier(" TCP ").value(), Carrier::kTcp);
  EXPECT_EQ(nameOf(Carrier::kShm), "shm");
  Result<Carrier> unknown = parseCarrier("pigeon");
  ASSERT_FALSE(unknown.ok());
  EXPECT_EQ(unknown.status().message(), "'pigeon' is no transport; there are auto, grpc, tcp, shm");
}

TEST(ParseSize, KnowsBinaryAndDecimalUnits) {
  EXPECT_EQ(parseSize("4096").value(), 4096u);
  EXPECT_EQ(parseSize("64KiB").value(), 65536u);
  EXPECT_EQ(parseSize("4 MiB").value(), 4u << 20);
  EXPECT_EQ(parseSize("1gb").value(), 1'000'000'000u);
  EXPECT_EQ(parseSize("1.5GiB").value(), 1'610'612'736u);
}

TEST(ParseSize, SaysWhatIsWrong) {
  for (const char* text : {"", "x", "4QiB", "-1", "1e30", "nan", "4 4"}) {
    const auto size = parseSize(text);
    ASSERT_FALSE(size.ok()) << text;
    EXPECT_EQ(size.status().code(), Code::kInvalidArgument);
    EXPECT_NE(size.status().message().find("'" + std::string(text) + "'"), std::string::npos);
  }
}

TEST(ParseServers, TakesNamesAddressesAndBrackets) {
  EXPECT_EQ(parseServers("").value(), std::vector<std::string>{});
  EXPECT_EQ(parseServers(" a:1 , 10.0.0.2:70,[::1]:7000").value(),
            (std::vector<std::string>{"a:1", "10.0.0.2:70", "[::1]:7000"}));
}

TEST(ParseServers, NamesTheItemThatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"a", "'a' has no port"},    {"a:0", "'a:0' has the port '0'"},
      {"a:70000", "70000"},        {"a:x", "port 'x'"},
      {":7", "no host"},           {"a:1,", "item 2 is empty"},
      {",a:1", "item 1 is empty"}, {"a:1,a:1", "twice"},
      {"::1:7", "brackets"},       {"http://a:7", "a character"},
      {"[::1]", "no port"},        {"a b:7", "a character"},
      {"a:7;b:7", "a character"},  {"a:7:b:7", "not host:port"}};
  for (const auto& [text, expected] : cases) {
    const auto servers = parseServers(text);
    ASSERT_FALSE(servers.ok()) << text;
    EXPECT_NE(servers.status().message().find(expected), std::string::npos)
        << servers.status().message();
  }
}

TEST(ParseAlgorithm, RoundTripsAndListsWhatThereIs) {
  for (const Algorithm a : {Algorithm::kAuto, Algorithm::kDirect, Algorithm::kServer,
                            Algorithm::kMixed, Algorithm::kRing}) {
    EXPECT_EQ(parseAlgorithm(nameOf(a)).value(), a);
  }
  const auto wrong = parseAlgorithm("tree");
  ASSERT_FALSE(wrong.ok());
  EXPECT_NE(wrong.status().message().find("auto, direct, server, mixed, ring"), std::string::npos);
}

}  // namespace
}  // namespace reducer::collective
