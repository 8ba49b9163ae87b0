// A generator whose numbers are the same on every machine, which std:: distributions do not
// promise.
#pragma once

#include <cstdint>

namespace reducer::transport::sim {

/// SplitMix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", 2014).
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t mixed = state_ += 0x9E3779B97F4A7C15U;
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9U;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBU;
    return mixed ^ mixed >> 31;
  }

  /// 0 .. max, both included. (The remainder's bias is of no account here.)
  std::uint64_t upTo(std::uint64_t max) {
    return max == ~std::uint64_t{0} ? next() : next() % (max + 1);
  }

 private:
  std::uint64_t state_;
};

}  // namespace reducer::transport::sim
