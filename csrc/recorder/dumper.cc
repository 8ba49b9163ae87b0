#include "recorder/dumper.h"

#include <fcntl.h>
#include <semaphore.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>

#include "recorder/json.h"

namespace reducer::recorder {
namespace {

// An error in one call is often followed by others: what they say belongs into the same file.
constexpr Duration kGather = std::chrono::milliseconds(50);
constexpr Duration kBetween = std::chrono::seconds(1);

/// What the signal's handler touches: all of it may be used there.
struct Alarm {
  sem_t wake;
  std::atomic<bool> asked{false};
  std::atomic<pid_t> owner{0};  // the process that has the thread
  std::array<struct sigaction, NSIG> before{};
  std::array<std::atomic<bool>, NSIG> installed{};

  Alarm() { sem_init(&wake, /*pshared=*/0, 0); }
};

// Never destroyed: a signal may come at any time.
Alarm& alarm() {
  static Alarm& instance = *new Alarm;
  return instance;
}
Alarm* for_handler = nullptr;  // set before a handler is installed

void onSignal(int number, siginfo_t* info, void* context) {
  const int saved = errno;
  Alarm& all = *for_handler;
  if (getpid() == all.owner.load()) {
    all.asked.store(true);
    sem_post(&all.wake);
  }
  const struct sigaction& before = all.before[static_cast<std::size_t>(number)];
  if ((before.sa_flags & SA_SIGINFO) != 0) {
    if (before.sa_sigaction != nullptr) before.sa_sigaction(number, info, context);
  } else if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) {
    before.sa_handler(number);
  }
  errno = saved;
}

void install(int number) {
  if (number <= 0 || number >= NSIG) return;
  Alarm& all = alarm();
  for_handler = &all;
  const auto index = static_cast<std::size_t>(number);
  if (all.installed[index].exchange(true)) return;
  // Known before the handler can be called.
  sigaction(number, nullptr, &all.before[index]);
  struct sigaction own {};
  own.sa_sigaction = &onSignal;
  own.sa_flags = SA_SIGINFO | SA_RESTART | SA_ONSTACK;
  sigemptyset(&own.sa_mask);
  if (sigaction(number, &own, nullptr) != 0) all.installed[index] = false;
}

std::string defaultFolder() {
  const char* const named = std::getenv("TMPDIR");
  return named != nullptr && *named != '\0' ? named : "/tmp";
}

/// The folder and those above it, as far as they are missing.
int makeFolders(const std::string& path) {
  for (std::size_t end = path.find('/', 1); end != std::string::npos; end = path.find('/', end + 1))
    mkdir(path.substr(0, end).c_str(), 0777);
  return mkdir(path.c_str(), 0700) == 0 || errno == EEXIST ? 0 : errno;
}

int writeFile(const std::string& path, const std::string& text) {
  const std::string fresh = path + "." + std::to_string(getpid());
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> file(std::fopen(fresh.c_str(), "we"),
                                                             &std::fclose);
  if (!file) return errno;
  const bool written = std::fwrite(text.data(), 1, text.size(), file.get()) == text.size() &&
                       std::fflush(file.get()) == 0;
  if (!written || std::rename(fresh.c_str(), path.c_str()) != 0) {
    const int error = errno;
    unlink(fresh.c_str());
    return error;
  }
  return 0;
}

}  // namespace

Dumper::Dumper(Recorder& recorder, Options options)
    : recorder_(recorder), options_(std::move(options)) {
  if (options_.folder.empty()) options_.folder = defaultFolder();
  alarm().owner.store(getpid());
  const auto trouble = [this](const std::string& why) {
    {
      const std::lock_guard lock(mutex_);
      if (!trouble_.empty()) return;
      trouble_ = why;
      due_ = std::max(Clock::now() + kGather, quiet_until_);
    }
    sem_post(&alarm().wake);
  };
  recorder_.listen(trouble, [this] { announce(); });
  install(options_.signal);
  announce();
  thread_ = std::thread([this] { run(); });
}

Dumper::~Dumper() {
  recorder_.listen(nullptr, nullptr);
  alarm().owner.store(0);
  stopping_ = true;
  sem_post(&alarm().wake);
  thread_.join();
  if (announcement_ >= 0) ::close(announcement_);
}

// (A forked child inherits it, but is another process.) Who reads it meanwhile gets all of the old
// one or all of the new.
void Dumper::announce() {
  const std::lock_guard lock(announcing_);
  Json json;
  json.beginObject();
  json.member("pid", getpid());
  json.member("signal", options_.signal);
  json.member("folder", options_.folder);
  recorder_.tellGroups(json);
  json.endObject();
  const int fresh = memfd_create("reducer-recorder", MFD_CLOEXEC);
  if (fresh < 0) return;  // then only the signal finds the way
  const std::string& text = json.text();
  const bool written =
      ::write(fresh, text.data(), text.size()) == static_cast<ssize_t>(text.size());
  if (written && announcement_ < 0) {
    announcement_ = fresh;
    return;
  }
  if (written) dup3(fresh, announcement_, O_CLOEXEC);
  ::close(fresh);
}

void Dumper::run() {
  TimePoint next = TimePoint::max();
  while (true) {
    if (next == TimePoint::max()) {
      sem_wait(&alarm().wake);  // or a signal came: then there is a look too many
    } else {
      const auto since = next.time_since_epoch();
      const auto whole = std::chrono::floor<std::chrono::seconds>(since);
      timespec until{};
      until.tv_sec = whole.count();
      until.tv_nsec = std::chrono::duration_cast<std::chrono::nanoseconds>(since - whole).count();
      sem_clockwait(&alarm().wake, CLOCK_MONOTONIC, &until);
    }
    const bool stopping = stopping_;
    next = serve(Clock::now(), stopping);
    if (stopping) return;
  }
}

TimePoint Dumper::serve(TimePoint now, bool stopping) {
  if (alarm().asked.exchange(false)) tell("a signal", write("signal"), true);
  std::string trouble;
  {
    const std::lock_guard lock(mutex_);
    if (trouble_.empty()) return TimePoint::max();
    if (now < due_ && !stopping) return due_;
    trouble.swap(trouble_);
    quiet_until_ = now + kBetween;
  }
  tell(trouble, write(trouble), false);
  return TimePoint::max();
}

Result<std::string> Dumper::write(const std::string& reason) {
  const Recorder::Home home = recorder_.home();
  const std::string folder = options_.folder + "/reducer-" + (home.job.empty() ? "none" : home.job);
  const std::string path = folder + "/rank" + std::to_string(home.rank) + ".json";
  int error = makeFolders(folder);
  if (error == 0) error = writeFile(path, recorder_.dump(reason));
  if (error == 0) return path;
  return Status(Code::kUnavailable, "the flight recorder cannot be written to " + path + ": " +
                                        std::strerror(error) +
                                        "; REDUCER_RECORDER_DIR names another folder");
}

/// Of errors once for each file.
void Dumper::tell(const std::string& reason, Result<std::string> path, bool always) {
  if (!options_.tells) return;
  const std::string text = path.ok() ? path.value() : path.status().message();
  if (!always && text == told_) return;
  told_ = text;
  if (!path.ok()) {
    std::fprintf(stderr, "reducer: warning: %s\n", text.c_str());
    return;
  }
  const std::string folder = text.substr(0, text.rfind('/'));
  std::fprintf(stderr,
               "reducer: flight recorder: after %s the last calls of rank %d are in %s "
               "(reducer blame %s)\n",
               reason.c_str(), recorder_.home().rank, text.c_str(), folder.c_str());
}

}  // namespace reducer::recorder
