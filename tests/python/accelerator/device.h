// An accelerator made of threads, for tests: streams that work late, events, and memory that the
// host cannot read. It is built so that a missing synchronisation gives a wrong result or a crash
// and not, by luck, the right answer. Nothing here knows torch.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace fake {

constexpr int kDevices = 2;
constexpr int kStreams = 33;  ///< of a device; number 0 is the default one, the others are the pool

using Task = std::function<void()>;

/// A point in a stream's queue, or anything else that comes once. Thread safety: any thread.
class Mark {
 public:
  void reach();
  bool reached() const;
  void wait() const;

 private:
  mutable std::mutex mutex_;
  mutable std::condition_variable changed_;
  bool reached_ = false;
};
using MarkPtr = std::shared_ptr<Mark>;

/// A queue with a thread, which runs the tasks one after the other. No task may need Python.
/// Thread safety: any thread.
class Stream {
 public:
  Stream(int device, int id) : device_(device), id_(id) {}

  int device() const { return device_; }
  int id() const { return id_; }

  /// Work on memory: it begins only a while (`setDelay`) after its turn has come.
  void launch(Task kernel);
  /// Work without a delay.
  void enqueue(Task task);
  /// What follows in this stream waits for the mark; the caller does not.
  void waitFor(MarkPtr mark);
  /// Reached when all that is in the queue now has run.
  MarkPtr mark();
  bool idle() const;
  /// Blocks the caller. Throws what a task threw, once.
  void synchronize();
  /// Runs what is queued, and ends the thread.
  void stop();

 private:
  void run();

  const int device_;
  const int id_;
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  bool running_ = false;  // a task
  bool stopped_ = false;
  std::string error_;
  std::thread thread_;  // from the first task on
};

/// Stream `id` of a device. It lives as long as the process.
Stream& stream(int device, int id);
/// The next one of the pool, in turn.
Stream& poolStream(int device);
void synchronizeDevice(int device);
void stopAll();

/// How late kernels are that are launched from now on.
void setDelay(std::chrono::microseconds delay);
std::chrono::microseconds delay();

/// Memory whose blocks are poisoned (all bits set: NaN, or -1) when they are new and when they are
/// free. A released block is poisoned, and may be given out again, only when the stream it belongs
/// to and the streams recorded on it have done what was in their queues at the release; any other
/// stream reads poison. Thread safety: any thread.
class Arena {
 public:
  enum class Kind {
    kDevice,  ///< the pointers are good for kernels alone: a host thread that follows one crashes
    kPinned,  ///< the same pointers are good for all
  };
  Arena(const char* name, Kind kind);

  /// `owner` may be null: then only recorded streams hold a released block back.
  void* allocate(std::size_t nbytes, Stream* owner);
  void release(void* pointer);
  /// A pointer into a block will do. Unknown pointers are ignored, as torch demands.
  void record(const void* pointer, Stream& stream);
  bool contains(const void* pointer) const;
  /// Where a kernel finds the memory at `pointer`. Throws if the range is not inside one block.
  char* forKernel(const void* pointer, std::size_t nbytes) const;

  const void* begin() const { return seen_; }
  std::size_t nbytes() const;
  std::size_t nbytesMax() const;  ///< since resetMax(); released blocks count until they are free
  void resetMax();

 private:
  struct Block {
    std::size_t offset = 0;
    std::size_t capacity = 0;
    std::set<Stream*> streams;
  };
  std::map<std::size_t, Block>::const_iterator find(const void* pointer) const;
  void recycle(const Block& block);

  const Kind kind_;
  char* seen_ = nullptr;    // what pointers point into
  char* worked_ = nullptr;  // the same memory, for kernels
  mutable std::mutex mutex_;
  std::map<std::size_t, Block> blocks_;                   // by offset
  std::multimap<std::size_t, std::size_t> free_offsets_;  // by capacity
  std::size_t end_ = 0;
  std::size_t nbytes_ = 0;
  std::size_t nbytes_max_ = 0;
};

Arena& deviceMemory(int device);
/// The device whose memory this is; -1 if it is none's.
int deviceOf(const void* pointer);
Arena& pinnedMemory();

/// A copy between host and device, as it ran.
struct Copy {
  bool upload = false;  ///< to the device
  bool pinned = false;  ///< the host's side
  std::size_t nbytes = 0;
  int stream = 0;
  std::chrono::steady_clock::time_point begin;
  std::chrono::steady_clock::time_point end;
};
/// Runs a copy, and remembers it: for a stream's thread.
void runCopy(Copy copy, const Task& move);
/// The copies since the last call.
std::vector<Copy> takeCopies();
/// Uploads that have not begun wait until this is taken back.
void holdUploads(bool hold);

}  // namespace fake
