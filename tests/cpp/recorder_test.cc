#include "recorder/recorder.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <memory>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "common/hexadecimal.h"
#include "recorder/dumper.h"
#include "recorder/json.h"
#include "wire/lane.h"

namespace reducer::recorder {
namespace {

using namespace std::chrono_literals;  // NOLINT(google-build-using-namespace): tests

std::size_t countOf(const std::string& text, const std::string& part) {
  std::size_t count = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) {
    ++count;
  }
  return count;
}

GroupInfo group(const std::string& name, Rank rank = 0) {
  GroupInfo info;
  info.job = "0123456789abcdef";
  info.name = name;
  info.rank = rank;
  info.world_size = 2;
  info.hosts = {"a:1", "b:2"};
  return info;
}

std::unique_ptr<Record> call(Recorder& recorder, std::uint32_t in, std::uint64_t seq) {
  return std::make_unique<Record>(&recorder, false, [&](Entry& entry) {
    entry.group = in;
    entry.seq = seq;
    entry.call.collective = Collective::kAllReduce;
    entry.call.op = ReduceOp::kSum;
    entry.call.dtype = DataType::kFloat32;
    entry.call.count = 10;
    entry.algorithm = "direct";
    entry.queued = Clock::now();
  });
}

TEST(Json, EscapesWhatMustBe) {
  Json json;
  json.beginObject();
  json.member("text",
              "a\"b\\c\nd\x01\xFF"
              "é");
  json.member("number", -3);
  json.member("time", 1.5);
  json.beginList("list");
  json.item("x");
  json.item("");
  json.endList();
  json.member("yes", true);
  json.endObject();
  EXPECT_EQ(json.text(),
            "{\"text\":\"a\\\"b\\\\c\\u000ad\\u0001?é\",\"number\":-3,\"time\":1.500000,"
            "\"list\":[\"x\",\"\"],\"yes\":true}");
}

TEST(Recorder, KeepsTheLastCallsAndHowFarTheyCame) {
  Recorder recorder(4);
  const std::uint32_t in = recorder.add(group("default"));
  std::vector<std::unique_ptr<Record>> calls;
  for (std::uint64_t seq = 0; seq < 6; ++seq) calls.push_back(call(recorder, in, seq));
  calls[0]->ended(Status(Code::kTimeout, "overwritten"));  // changes nothing
  calls[2]->started();
  calls[3]->started();
  calls[3]->answered();
  calls[3]->ended(Status());
  calls[4]->late("rank 1 has not arrived");
  calls[4]->waitedFor({"rank 1 at b:7000 (1 chunk)"});
  calls[4]->ended(Status(Code::kTimeout, "waiting for rank 1"));
  calls[5]->passedOn();
  const std::string text = recorder.dump("test");
  for (const char* part :
       {"\"recorded\":6", "\"reason\":\"test\"", "\"entries\":4", "\"state\":\"started\"",
        "\"state\":\"done\"", "\"state\":\"passed on\"", "\"error\":\"waiting for rank 1\"",
        "\"late\":\"rank 1 has not arrived\"", "\"code\":\"timeout\"",
        "\"waits_for\":[\"rank 1 at b:7000 (1 chunk)\"]", "\"hosts\":[\"a:1\",\"b:2\"]"}) {
    EXPECT_EQ(countOf(text, part), 1u) << part << "\n" << text;
  }
  for (const char* part : {"\"kind\":\"collective\"", "\"bytes\":40", "\"algorithm\":\"direct\""}) {
    EXPECT_EQ(countOf(text, part), 4u) << part;
  }
  EXPECT_EQ(countOf(text, "\"answered\""), 1u);
  EXPECT_EQ(countOf(text, "overwritten"), 0u);
}

TEST(Recorder, ARecordWithoutARecorderDoesNothing) {
  Record none(nullptr, false, [](Entry&) { FAIL() << "nobody asked"; });
  EXPECT_FALSE(none);
  none.started();
  none.answered();
  none.waitedFor({"x"});
  none.late("x");
  none.passedOn();
  none.ended(Status(Code::kTimeout, "x"));
}

struct FakeSource final : Source {
  std::uint64_t called() override { return 17; }
  std::vector<std::string> waitsFor(std::uint64_t lane, std::uint64_t seq) override {
    return {std::to_string(lane) + "/" + std::to_string(seq)};
  }
};

TEST(Recorder, AsksAGroupOnlyWhileItIsThereAndOnlyOfWhatIsUnderWay) {
  Recorder recorder(10);
  EXPECT_EQ(recorder.home().job, "");
  const std::uint32_t in = recorder.add(group("default", 1));
  EXPECT_EQ(recorder.home().job, "30313233");
  EXPECT_EQ(recorder.home().rank, 1);
  recorder.add(group("another", 0));
  EXPECT_EQ(recorder.home().rank, 1) << "the first of those that are open";
  auto source = std::make_shared<FakeSource>();
  recorder.setSource(in, source);
  const auto under_way = call(recorder, in, 3);
  call(recorder, in, 4)->ended(Status());
  std::string text = recorder.dump("test");
  EXPECT_EQ(countOf(text, "\"waits_for\":[\"0/3\"]"), 1u) << text;
  EXPECT_EQ(countOf(text, "\"waits_for\":[]"), 1u);
  EXPECT_EQ(countOf(text, "\"called\":17"), 1u);
  source.reset();
  text = recorder.dump("test");
  EXPECT_EQ(countOf(text, "\"called\""), 0u);
  EXPECT_EQ(countOf(text, "\"waits_for\":[]"), 2u);
  recorder.remove(in);
  EXPECT_EQ(countOf(recorder.dump("test"), "\"open\":false"), 1u);
}

TEST(Recorder, KeepsNoMoreGroupsAndTextsThanEntriesCanNeed) {
  Recorder recorder(8);
  for (int i = 0; i < 1000; ++i) {
    const std::uint32_t in = recorder.add(group("g" + std::to_string(i)));
    call(recorder, in, 0)->ended(Status(Code::kTimeout, "failed " + std::to_string(i)));
    recorder.remove(in);
  }
  const std::string text = recorder.dump("test");
  EXPECT_LE(countOf(text, "\"name\""), 64u);
  EXPECT_EQ(countOf(text, "\"error\""), 8u);
  EXPECT_LT(text.size(), 40'000u);
}

TEST(Recorder, ThreadsRecordAndDumpAtOnce) {
  Recorder recorder(16);
  const std::uint32_t in = recorder.add(group("default"));
  std::atomic<bool> stop{false};
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (std::uint64_t seq = 0; !stop; ++seq) {
        const auto one = call(recorder, in, seq);
        one->started();
        one->ended(seq % 100 == 0 ? Status(Code::kTimeout, "late") : Status());
      }
    });
  }
  for (int i = 0; i < 50; ++i) {
    const std::string text = recorder.dump("test");
    EXPECT_LE(countOf(text, "\"number\""), 16u);
  }
  stop = true;
  for (std::thread& thread : threads) thread.join();
}

// ------------------------------------------------------------------ files

class DumperTest : public testing::Test {
 protected:
  DumperTest() {
    folder_ = std::filesystem::temp_directory_path() /
              ("recorder-test-" + std::to_string(getpid()) + "/below");
    in_ = recorder_.add(group("default", 3));
  }
  ~DumperTest() override { std::filesystem::remove_all(folder_.parent_path()); }

  Dumper::Options options(int signal = 0) const { return {folder_.string(), signal, false}; }
  std::filesystem::path file() const { return folder_ / "reducer-30313233" / "rank3.json"; }
  std::string content() const {
    std::ifstream in(file());
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
  }
  bool appears(const std::string& part) const {
    const auto end = Clock::now() + 10s;
    while (Clock::now() < end) {
      if (content().find(part) != std::string::npos) return true;
      std::this_thread::sleep_for(5ms);
    }
    return false;
  }

  Recorder recorder_{100};
  std::uint32_t in_ = 0;
  std::filesystem::path folder_;
};

TEST_F(DumperTest, WritesAfterAnErrorButNotAfterAnAbort) {
  {
    Dumper dumper(recorder_, options());  // at its end all that is to be written has been
    call(recorder_, in_, 0)->ended(Status(Code::kAborted, "as the user wished"));
    call(recorder_, in_, 1)->ended(Status(Code::kInvalidArgument, "told at once"));
  }
  EXPECT_FALSE(std::filesystem::exists(file()));
  Dumper dumper(recorder_, options());
  call(recorder_, in_, 2)->ended(Status(Code::kUnavailable, "the first"));
  EXPECT_TRUE(appears("the first"));
  EXPECT_NE(content().find("an error in group 'default'"), std::string::npos);
  call(recorder_, in_, 3)->ended(Status(Code::kMismatch, "the second"));
  EXPECT_TRUE(appears("the second")) << "later, but it is written";
}

TEST_F(DumperTest, WritesAtTheEndWhatIsStillToBeWritten) {
  {
    Dumper dumper(recorder_, options());
    recorder_.trouble(in_, Status(Code::kUnavailable, "lost"));
  }
  EXPECT_TRUE(std::filesystem::exists(file()));
  recorder_.trouble(in_, Status(Code::kUnavailable, "nobody listens"));
}

int heard = 0;
void hear(int) { ++heard; }

TEST_F(DumperTest, ASignalWritesAndTheEarlierHandlerIsCalled) {
  ::signal(SIGUSR2, &hear);
  {
    Dumper dumper(recorder_, options(SIGUSR2));
    const auto under_way = call(recorder_, in_, 5);
    raise(SIGUSR2);
    EXPECT_EQ(heard, 1);
    EXPECT_TRUE(appears("\"seq\":5"));
  }
  raise(SIGUSR2);
  EXPECT_EQ(heard, 2);
  Dumper again(recorder_, options(SIGUSR2));
  const auto under_way = call(recorder_, in_, 6);
  raise(SIGUSR2);
  EXPECT_EQ(heard, 3) << "called once, though the dumper is the second";
  EXPECT_TRUE(appears("\"seq\":6"));
}

/// What `reducer dump` would read of this process.
std::string announced() {
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const std::string target = std::filesystem::read_symlink(entry.path(), gone).string();
    if (!target.starts_with("/memfd:reducer-recorder")) continue;
    std::ifstream in(entry.path());
    std::stringstream text;
    text << in.rdbuf();
    return text.str();
  }
  return {};
}

TEST_F(DumperTest, AnnouncesTheGroupsThatAreOpen) {
  const std::string number = hexadecimal("0123456789abcdef");
  const std::string begin = "{\"pid\":" + std::to_string(getpid()) + ",\"signal\":0,\"folder\":\"" +
                            folder_.string() + "\",\"job\":\"30313233\",\"rank\":3,\"groups\":[";
  const auto entry = [&](const std::string& name) {
    return "{\"job\":\"" + number + "\",\"name\":\"" + name + "\"}";
  };
  std::uint32_t second = 0;
  {
    const Dumper dumper(recorder_, options());
    EXPECT_EQ(announced(), begin + entry("default") + "]}");
    second = recorder_.add(group("of \"two\"", 1));
    EXPECT_EQ(announced(), begin + entry("default") + "," + entry("of \\\"two\\\"") + "]}");
    recorder_.remove(in_);
    EXPECT_EQ(announced(), begin + entry("of \\\"two\\\"") + "]}");
  }
  EXPECT_EQ(announced(), "");
  recorder_.remove(second);  // nobody listens
}

TEST_F(DumperTest, SaysWhyItCannotWrite) {
  std::filesystem::create_directories(folder_.parent_path());
  std::ofstream(folder_) << "a file where the folder should be";
  Dumper dumper(recorder_, options());
  const auto written = dumper.write("test");
  ASSERT_FALSE(written.ok());
  EXPECT_NE(written.status().message().find(file().string() + ": Not a directory"),
            std::string::npos)
      << written.status().message();
}

}  // namespace
}  // namespace reducer::recorder
