// One operation of the group, as a call's arguments.
#pragma once

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <optional>
#include <vector>

#include "common/types.h"

namespace reducer::torch_backend {

/// The arguments that an operation takes, in the order of ranks where there are several. A call has
/// one part, a coalesced call one for each tensor.
struct Part {
  DataType dtype = DataType::kUInt8;
  ReduceOp op = ReduceOp::kNone;
  std::size_t count = 0;  ///< elements of `in` and of `out`
  const void* in = nullptr;
  void* out = nullptr;
  std::vector<const void*> ins;
  std::vector<void*> outs;
  std::vector<std::size_t> in_counts;
  std::vector<std::size_t> out_counts;
  /// Every rank knows all counts, so that all can cut the operation in the same way.
  bool divisible = false;
  /// Of the call, where this is a slice of it: elements that all ranks compare.
  std::optional<std::size_t> whole_count;

  std::size_t longest() const {
    std::size_t most = count;
    for (const auto* counts : {&in_counts, &out_counts}) {
      for (const std::size_t one : *counts) most = std::max(most, one);
    }
    return most;
  }

  /// Elements [first, first + n) of every piece of memory.
  Part slice(std::size_t first, std::size_t n) const {
    Part part = *this;
    const auto left = [&](std::size_t all) { return std::min(n, all - std::min(all, first)); };
    const std::size_t skip = first * sizeOf(dtype);
    part.count = left(count);
    if (in != nullptr) part.in = static_cast<const char*>(in) + skip;
    if (out != nullptr) part.out = static_cast<char*>(out) + skip;
    for (const void*& one : part.ins) {
      if (one != nullptr) one = static_cast<const char*>(one) + skip;
    }
    for (void*& one : part.outs) {
      if (one != nullptr) one = static_cast<char*>(one) + skip;
    }
    for (auto* counts : {&part.in_counts, &part.out_counts}) {
      for (std::size_t& one : *counts) one = left(one);
    }
    return part;
  }

  /// Puts `replace(pointer, nbytes)` in the place of every pointer to memory of this rank.
  template <class Replace>
  void replacePieces(Replace replace) {
    const std::size_t element = sizeOf(dtype);
    const bool in_place = in == out;
    if (in != nullptr) in = replace(in, count * element);
    if (in_place) {
      out = const_cast<void*>(in);
    } else if (out != nullptr) {
      out = replace(out, count * element);
    }
    for (std::size_t r = 0; r < ins.size(); ++r) {
      if (ins[r] != nullptr) ins[r] = replace(ins[r], in_counts[r] * element);
    }
    for (std::size_t r = 0; r < outs.size(); ++r) {
      if (outs[r] != nullptr) outs[r] = replace(outs[r], out_counts[r] * element);
    }
  }

  /// Bytes of all memory of this rank.
  std::size_t nbytes() const {
    std::size_t elements = (in != nullptr || out != nullptr ? count : 0);
    if (in != nullptr && out != nullptr && in != out) elements += count;
    for (std::size_t r = 0; r < ins.size(); ++r) elements += in_counts[r];
    for (std::size_t r = 0; r < outs.size(); ++r) elements += out_counts[r];
    return elements * sizeOf(dtype);
  }
};

/// Parts of about `nbytes_max`, where that is possible: what is copied to a device while the next
/// is on the network. Equal on all ranks, whatever their role is.
inline std::vector<Part> segments(std::vector<Part> parts, std::size_t nbytes_max) {
  std::vector<Part> all;
  for (Part& part : parts) {
    const std::size_t pieces =
        std::max<std::size_t>({1, part.in_counts.size(), part.out_counts.size()});
    const std::size_t length = std::max<std::size_t>(1, nbytes_max / pieces / sizeOf(part.dtype));
    const std::size_t longest = part.longest();
    if (!part.divisible || longest <= length) {
      all.push_back(std::move(part));
      continue;
    }
    const std::vector<std::size_t>& counts =
        part.in_counts.empty() ? part.out_counts : part.in_counts;
    part.whole_count =
        counts.empty() ? part.count : std::accumulate(counts.begin(), counts.end(), std::size_t{0});
    for (std::size_t first = 0; first < longest; first += length) {
      all.push_back(part.slice(first, length));
    }
  }
  return all;
}

}  // namespace reducer::torch_backend
