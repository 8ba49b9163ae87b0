#include "device.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <utility>

namespace fake {
namespace {

constexpr std::size_t kArenaBytes = std::size_t{8} << 30;  // of addresses; memory comes with use
constexpr std::size_t kPage = 4096;
constexpr int kPoison = 0xff;

std::atomic<std::int64_t> delay_us{0};

// ------------------------------------------------------------------ the host's hands off

struct sigaction action_before;

void explainFault(int signal, siginfo_t* info, void* /*context*/) {
  if (deviceOf(info->si_addr) >= 0) {
    constexpr char kText[] = "fake accelerator: host code touched device memory\n";
    static_cast<void>(!write(STDERR_FILENO, kText, sizeof(kText) - 1));
  }
  sigaction(signal, &action_before, nullptr);  // the access is tried again, and meets that
}

void watchFaults() {
  static std::once_flag once;
  std::call_once(once, [] {
    struct sigaction action = {};
    action.sa_sigaction = explainFault;
    action.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &action, &action_before);
  });
}

char* mapOrThrow(int file, int protection) {
  void* const mapped = mmap(nullptr, kArenaBytes, protection, MAP_SHARED | MAP_NORESERVE, file, 0);
  if (mapped == MAP_FAILED) throw std::runtime_error("fake accelerator: mmap failed");
  return static_cast<char*>(mapped);
}

// Never destroyed: tensors may outlive the statics.
struct Machine {
  std::mutex mutex;
  std::array<std::array<std::unique_ptr<Stream>, kStreams>, kDevices> streams;
  std::array<int, kDevices> next = {};
};
Machine& machine() {
  static Machine* const all = new Machine;
  return *all;
}

struct CopyLog {
  std::mutex mutex;
  std::condition_variable changed;
  bool uploads_held = false;
  std::vector<Copy> copies;
};
CopyLog& copyLog() {
  static CopyLog* const log = new CopyLog;
  return *log;
}

// For the signal handler, which must not construct anything.
std::array<std::atomic<const char*>, kDevices> device_begins = {};

}  // namespace

// ------------------------------------------------------------------ streams

void Mark::reach() {
  const std::lock_guard lock(mutex_);
  reached_ = true;
  changed_.notify_all();
}

bool Mark::reached() const {
  const std::lock_guard lock(mutex_);
  return reached_;
}

void Mark::wait() const {
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return reached_; });
}

void Stream::launch(Task kernel) {
  enqueue([kernel = std::move(kernel), late = delay()] {
    std::this_thread::sleep_for(late);
    kernel();
  });
}

void Stream::enqueue(Task task) {
  const std::lock_guard lock(mutex_);
  if (stopped_) return;  // the interpreter is going
  tasks_.push_back(std::move(task));
  if (!thread_.joinable()) thread_ = std::thread([this] { run(); });
  changed_.notify_all();
}

void Stream::waitFor(MarkPtr mark) {
  enqueue([mark = std::move(mark)] { mark->wait(); });
}

MarkPtr Stream::mark() {
  auto mark = std::make_shared<Mark>();
  const std::lock_guard lock(mutex_);
  if (tasks_.empty() && !running_) {
    mark->reach();
  } else {
    tasks_.emplace_back([mark] { mark->reach(); });
    changed_.notify_all();
  }
  return mark;
}

bool Stream::idle() const {
  const std::lock_guard lock(mutex_);
  return tasks_.empty() && !running_;
}

void Stream::synchronize() {
  mark()->wait();
  std::string error;
  {
    const std::lock_guard lock(mutex_);
    error.swap(error_);
  }
  if (!error.empty()) throw std::runtime_error("fake accelerator: a kernel failed: " + error);
}

void Stream::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return stopped_ || !tasks_.empty(); });
    if (tasks_.empty()) return;
    {
      const Task task = std::move(tasks_.front());
      tasks_.pop_front();
      running_ = true;
      lock.unlock();
      std::string error;
      try {
        task();
      } catch (const std::exception& failure) {
        error = failure.what();
        std::fprintf(stderr, "fake accelerator: a kernel failed: %s\n", failure.what());
      }
      lock.lock();
      if (error_.empty()) error_ = std::move(error);
    }
    running_ = false;
  }
}

void Stream::stop() {
  std::thread thread;
  {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
    thread = std::move(thread_);
  }
  if (thread.joinable()) thread.join();
}

Stream& stream(int device, int id) {
  if (device < 0 || device >= kDevices || id < 0 || id >= kStreams)
    throw std::runtime_error("fake accelerator: there is no stream " + std::to_string(id) +
                             " of device " + std::to_string(device));
  Machine& all = machine();
  const std::lock_guard lock(all.mutex);
  std::unique_ptr<Stream>& found = all.streams[device][id];
  if (!found) found = std::make_unique<Stream>(device, id);
  return *found;
}

Stream& poolStream(int device) {
  int id = 0;
  {
    Machine& all = machine();
    const std::lock_guard lock(all.mutex);
    int& next = all.next.at(device);
    id = 1 + next;
    next = (next + 1) % (kStreams - 1);
  }
  return stream(device, id);
}

void synchronizeDevice(int device) {
  for (int id = 0; id < kStreams; ++id) stream(device, id).synchronize();
}

void stopAll() {
  holdUploads(false);
  for (int device = 0; device < kDevices; ++device) {
    for (int id = 0; id < kStreams; ++id) stream(device, id).stop();
  }
}

void setDelay(std::chrono::microseconds delay) { delay_us = delay.count(); }

std::chrono::microseconds delay() { return std::chrono::microseconds(delay_us.load()); }

// ------------------------------------------------------------------ memory

Arena::Arena(const char* name, Kind kind) : kind_(kind) {
  const int file = memfd_create(name, MFD_CLOEXEC);
  if (file < 0 || ftruncate(file, static_cast<off_t>(kArenaBytes)) != 0)
    throw std::runtime_error("fake accelerator: memfd_create failed");
  worked_ = mapOrThrow(file, PROT_READ | PROT_WRITE);
  seen_ = kind == Kind::kDevice ? mapOrThrow(file, PROT_NONE) : worked_;
  close(file);
  if (kind == Kind::kDevice) watchFaults();
}

void* Arena::allocate(std::size_t nbytes, Stream* owner) {
  const std::size_t capacity = (std::max<std::size_t>(nbytes, 1) + kPage - 1) / kPage * kPage;
  const std::lock_guard lock(mutex_);
  Block block;
  if (const auto it = free_offsets_.find(capacity); it != free_offsets_.end()) {
    block.offset = it->second;
    free_offsets_.erase(it);
  } else {
    if (end_ + capacity > kArenaBytes) throw std::runtime_error("fake accelerator: out of memory");
    block.offset = end_;
    end_ += capacity;
    std::memset(worked_ + block.offset, kPoison, capacity);
  }
  block.capacity = capacity;
  if (owner != nullptr) block.streams.insert(owner);
  nbytes_ += capacity;
  nbytes_max_ = std::max(nbytes_max_, nbytes_);
  char* const pointer = seen_ + block.offset;
  blocks_.emplace(block.offset, std::move(block));
  return pointer;
}

void Arena::release(void* pointer) {
  Block block;
  {
    const std::lock_guard lock(mutex_);
    const auto it = find(pointer);
    if (it == blocks_.end()) throw std::runtime_error("fake accelerator: released twice");
    block = it->second;
    blocks_.erase(it);
  }
  // The last of the streams to come past this point does it; one for the caller itself.
  const auto left = std::make_shared<std::atomic<std::size_t>>(block.streams.size() + 1);
  const Task passed = [this, left, block] {
    if (left->fetch_sub(1) == 1) recycle(block);
  };
  for (Stream* stream : block.streams) {
    if (stream->idle()) {
      passed();
    } else {
      stream->enqueue(passed);
    }
  }
  passed();
}

void Arena::recycle(const Block& block) {
  std::memset(worked_ + block.offset, kPoison, block.capacity);
  const std::lock_guard lock(mutex_);
  free_offsets_.emplace(block.capacity, block.offset);
  nbytes_ -= block.capacity;
}

std::map<std::size_t, Arena::Block>::const_iterator Arena::find(const void* pointer) const {
  if (!contains(pointer)) return blocks_.end();
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(pointer) - seen_);
  auto it = blocks_.upper_bound(offset);
  if (it == blocks_.begin()) return blocks_.end();
  --it;
  return offset < it->first + it->second.capacity ? it : blocks_.end();
}

void Arena::record(const void* pointer, Stream& stream) {
  const std::lock_guard lock(mutex_);
  const auto it = find(pointer);
  if (it != blocks_.end()) blocks_.at(it->first).streams.insert(&stream);
}

bool Arena::contains(const void* pointer) const {
  const auto* const address = static_cast<const char*>(pointer);
  return address >= seen_ && address < seen_ + kArenaBytes;
}

char* Arena::forKernel(const void* pointer, std::size_t nbytes) const {
  const std::lock_guard lock(mutex_);
  const auto it = find(pointer);
  if (it == blocks_.end())
    throw std::runtime_error("fake accelerator: a kernel on memory that is not allocated");
  const auto offset = static_cast<std::size_t>(static_cast<const char*>(pointer) - seen_);
  if (offset + nbytes > it->first + it->second.capacity)
    throw std::runtime_error("fake accelerator: a kernel beyond the end of its memory");
  return worked_ + offset;
}

std::size_t Arena::nbytes() const {
  const std::lock_guard lock(mutex_);
  return nbytes_;
}

std::size_t Arena::nbytesMax() const {
  const std::lock_guard lock(mutex_);
  return nbytes_max_;
}

void Arena::resetMax() {
  const std::lock_guard lock(mutex_);
  nbytes_max_ = nbytes_;
}

Arena& deviceMemory(int device) {
  static const std::array<Arena*, kDevices> arenas = [] {
    std::array<Arena*, kDevices> made{};
    for (int i = 0; i < kDevices; ++i) {
      made.at(i) = new Arena("fake-device", Arena::Kind::kDevice);
      device_begins.at(i) = static_cast<const char*>(made.at(i)->begin());
    }
    return made;
  }();
  return *arenas.at(device);
}

int deviceOf(const void* pointer) {
  const auto* const address = static_cast<const char*>(pointer);
  for (int i = 0; i < kDevices; ++i) {
    const char* const begin = device_begins[i].load();
    if (begin != nullptr && address >= begin && address < begin + kArenaBytes) return i;
  }
  return -1;
}

Arena& pinnedMemory() {
  static Arena* const arena = new Arena("fake-pinned", Arena::Kind::kPinned);
  return *arena;
}

// ------------------------------------------------------------------ copies

void runCopy(Copy copy, const Task& move) {
  CopyLog& log = copyLog();
  {
    std::unique_lock lock(log.mutex);
    log.changed.wait(lock, [&] { return !copy.upload || !log.uploads_held; });
  }
  copy.begin = std::chrono::steady_clock::now();
  move();
  copy.end = std::chrono::steady_clock::now();
  const std::lock_guard lock(log.mutex);
  log.copies.push_back(copy);
}

std::vector<Copy> takeCopies() {
  CopyLog& log = copyLog();
  const std::lock_guard lock(log.mutex);
  return std::exchange(log.copies, {});
}

void holdUploads(bool hold) {
  CopyLog& log = copyLog();
  const std::lock_guard lock(log.mutex);
  log.uploads_held = hold;
  log.changed.notify_all();
}

}  // namespace fake
