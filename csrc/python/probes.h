// What benchmarks/ times from Python: the engine alone, and the plain loop that it is compared
// with.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/engine.h"

namespace reducer::python {

/// An engine with `ranks` workers whose float32 chunks come from buffers too large for the caches.
/// Not thread safe.
class EngineProbe {
 public:
  EngineProbe(int ranks, std::size_t chunk_bytes, std::size_t buffer_bytes);

  /// Pushes every rank's buffer through the engine, chunk by chunk, and sums. Returns the bytes of
  /// memory moved: every contribution read once, every result written once.
  std::uint64_t run();

 private:
  struct Worker : engine::Peer {};

  const std::size_t chunk_bytes_;
  const std::size_t nbytes_;
  std::vector<std::shared_ptr<std::vector<float>>> buffers_;
  std::vector<std::shared_ptr<Worker>> workers_;
  engine::Engine engine_;
  const std::shared_ptr<engine::BufferPool> pool_ = engine::BufferPool::create();
  std::uint64_t seq_ = 0;
};

/// a[i] += b[i] over two arrays, as a compiler makes it. Returns the bytes moved: two reads and a
/// write.
class AddProbe {
 public:
  explicit AddProbe(std::size_t buffer_bytes);
  std::uint64_t run();

 private:
  const std::size_t count_;
  std::vector<float> a_;
  std::vector<float> b_;
};

}  // namespace reducer::python
