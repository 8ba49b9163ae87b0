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

TEST(ParseBandwidth, TakesBitsWithTheirUnit) {
  EXPECT_EQ(parseBandwidth("10gbit").value(), 10'000'000'000u);
  EXPECT_EQ(parseBandwidth(" 2.5 Gbit ").value(), 2'500'000'000u);
  EXPECT_EQ(parseBandwidth("800mbit").value(), 800'000'000u);
  EXPECT_EQ(parseBandwidth("1bit").value(), 1u);
  for (const char* text : {"", "10", "10GB", "0gbit", "-1gbit", "fast", "1e30gbit", "nan gbit"}) {
    const auto bandwidth = parseBandwidth(text);
    ASSERT_FALSE(bandwidth.ok()) << text;
    EXPECT_NE(bandwidth.status().message().find("'" + std::string(text) + "'"), std::string::npos);
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

TEST(ParseRanges, TakesOneNameOrAnAlgorithmForEverySize) {
  const auto one = parseRanges(" Mixed ").value();
  EXPECT_EQ(one, std::vector<SizeRange>{{.algorithm = Algorithm::kMixed}});
  const auto two = parseRanges("64KiB-:mixed, 0-64KiB:direct").value();
  EXPECT_EQ(two, (std::vector<SizeRange>{{0, 65536, Algorithm::kDirect},
                                         {65536, SizeRange::kNoEnd, Algorithm::kMixed}}));
  const auto sized = parseRanges("0-:server/128KiB/8MiB").value();
  EXPECT_EQ(
      sized,
      (std::vector<SizeRange>{{0, SizeRange::kNoEnd, Algorithm::kServer, 128 << 10, 8 << 20}}));
}

TEST(ParseRanges, TextsRoundTrip) {
  for (const char* text : {"auto", "0-64KiB:direct,64KiB-:mixed", "0-100:ring,100-:server/64KiB",
                           "0-1GiB:direct/0/3MiB,1GiB-:auto", "0-:mixed/4KiB"}) {
    const std::string as_read = textOf(parseRanges(text).value());
    EXPECT_EQ(parseRanges(as_read).value(), parseRanges(text).value()) << as_read;
    Settings settings;
    settings.choose(parseRanges(text).value());
    EXPECT_EQ(settings.algorithmText(), as_read);
  }
  EXPECT_EQ(textOf(parseRanges("0-65536:direct,64KiB-:mixed").value()),
            "0-64KiB:direct,64KiB-:mixed");
}

TEST(ParseRanges, NamesTheItemThatIsWrong) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "'' is no algorithm"},
      {"0-64KiB:direct", "no algorithm is given from 64KiB on"},
      {"4-:direct", "no algorithm is given for 0-4, before '4-:direct'"},
      {"0-64KiB:direct,1MiB-:mixed", "given for 64KiB-1MiB, before '1MiB-:mixed'"},
      {"0-2MiB:direct,1MiB-:mixed", "'0-2MiB:direct' and '1MiB-:mixed' overlap"},
      {"0-:direct,0-:mixed", "overlap"},
      {"0-64KiB:direct,64KiB-:tree", "'64KiB-:tree': 'tree' is no algorithm"},
      {"0-64KiB:direct,", "item 2 is empty"},
      {"0-64KiB:direct,mixed", "'mixed': it has no algorithm"},
      {"0-64QiB:direct", "'64QiB' is no size"},
      {"8-4:direct,4-:mixed", "'8-4:direct': it ends before it begins"},
      {"64KiB:direct", "'64KiB' is no range"},
      {"0-:direct/1KiB", "its chunk of 1KiB is outside of 4KiB to 16MiB"},
      {"0-:direct/x", "'x' is no size"},
      {"0-:direct/8KiB/y", "'y' is no size"}};
  for (const auto& [text, expected] : cases) {
    const auto ranges = parseRanges(text);
    ASSERT_FALSE(ranges.ok()) << text;
    EXPECT_EQ(ranges.status().code(), Code::kInvalidArgument);
    EXPECT_NE(ranges.status().message().find(expected), std::string::npos)
        << text << ": " << ranges.status().message();
  }
}

}  // namespace
}  // namespace reducer::collective
