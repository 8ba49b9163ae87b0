// How fast the kernels are, beside what the machine can do: memcpy, and a plain loop that adds.
//
// A line is named CODE/TYPE/n:INPUTS/BYTES. bytes_per_second counts input: INPUTS * BYTES per
// iteration (one input for memcpy), so lines with the same number of inputs compare directly. "cut"
// lines get their inputs in pieces of about 8 KiB at odd addresses, as a network delivers them.
#include <benchmark/benchmark.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/reduce.h"

namespace reducer::kernels {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::size_t kPieceBytes = 8191;  // odd: elements straddle pieces

/// Memory that has been written once, so that no page is the shared zero page.
std::shared_ptr<std::byte> allocate(std::size_t nbytes) {
  const std::size_t rounded = (nbytes + kAlignment - 1) / kAlignment * kAlignment;
  auto* bytes = static_cast<std::byte*>(std::aligned_alloc(kAlignment, rounded));
  if (bytes == nullptr) std::abort();
  for (std::size_t i = 0; i < rounded; ++i) bytes[i] = static_cast<std::byte>(i % 61);
  return {bytes, [](std::byte* p) { std::free(p); }};
}

Payload whole(std::size_t nbytes) {
  auto memory = allocate(nbytes);
  return {Bytes(memory.get(), nbytes), memory};
}

/// Every piece at an odd address, and inputs break at places of their own.
Payload cut(std::size_t nbytes, std::size_t input) {
  const std::size_t count = nbytes / kPieceBytes + 2;
  auto memory = allocate(count * (kPieceBytes + 1) + kAlignment);
  std::vector<Bytes> pieces;
  std::size_t size = kPieceBytes - 101 * input % kPieceBytes;
  for (std::size_t done = 0; done < nbytes; done += size, size = kPieceBytes) {
    size = std::min(size, nbytes - done);
    pieces.emplace_back(memory.get() + pieces.size() * (kPieceBytes + 1) + 1, size);
  }
  return {std::move(pieces), memory};
}

void setBytes(benchmark::State& state, std::size_t nbytes) {
  state.SetBytesProcessed(state.iterations() * static_cast<std::int64_t>(nbytes));
}

void reduceNary(benchmark::State& state, DataType dtype, std::size_t inputs, std::size_t nbytes,
                bool in_pieces) {
  std::vector<Payload> payloads;
  for (std::size_t i = 0; i < inputs; ++i)
    payloads.push_back(in_pieces ? cut(nbytes, i) : whole(nbytes));
  const auto out = allocate(nbytes);
  for (auto _ : state) {
    reduce(dtype, ReduceOp::kSum, payloads, out.get(), nbytes / sizeOf(dtype));
    benchmark::ClobberMemory();
  }
  setBytes(state, inputs * nbytes);
}

/// out = first; out += each of the others: what one writes without a library.
void plainAdd(benchmark::State& state, std::size_t inputs, std::size_t nbytes) {
  std::vector<std::shared_ptr<std::byte>> sources;
  for (std::size_t i = 1; i < inputs; ++i) sources.push_back(allocate(nbytes));
  const auto memory = allocate(nbytes);
  auto* const out = reinterpret_cast<float*>(memory.get());
  const std::size_t count = nbytes / sizeof(float);
  for (auto _ : state) {
    for (const auto& source : sources) {
      const auto* const in = reinterpret_cast<const float*>(source.get());
      for (std::size_t i = 0; i < count; ++i) out[i] += in[i];
      benchmark::ClobberMemory();
    }
  }
  setBytes(state, inputs * nbytes);
}

void plainCopy(benchmark::State& state, std::size_t nbytes) {
  const auto from = allocate(nbytes);
  const auto to = allocate(nbytes);
  for (auto _ : state) {
    std::memcpy(to.get(), from.get(), nbytes);
    benchmark::ClobberMemory();
  }
  setBytes(state, nbytes);
}

void registerAll() {
  using benchmark::RegisterBenchmark;
  const std::pair<const char*, std::size_t> sizes[] = {{"64KiB", 64 << 10}, {"16MiB", 16 << 20}};
  for (const auto& [size, nbytes] : sizes) {
    const std::string tail = std::string("/") + size;
    RegisterBenchmark(("memcpy" + tail).c_str(), plainCopy, nbytes);
    for (const std::size_t inputs : {2, 4, 8, 32}) {
      const std::string of = "/n:" + std::to_string(inputs) + tail;
      RegisterBenchmark(("plain_add/float32" + of).c_str(), plainAdd, inputs, nbytes);
      for (const DataType dtype : {DataType::kFloat32, DataType::kBFloat16, DataType::kFloat16}) {
        const std::string typed = std::string(nameOf(dtype)) + of;
        RegisterBenchmark(("reduce/" + typed).c_str(), reduceNary, dtype, inputs, nbytes, false);
        RegisterBenchmark(("cut/" + typed).c_str(), reduceNary, dtype, inputs, nbytes, true);
      }
    }
  }
}

}  // namespace
}  // namespace reducer::kernels

int main(int argc, char** argv) {
  reducer::kernels::registerAll();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::AddCustomContext("instruction set", reducer::kernels::instructionSets().front());
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
