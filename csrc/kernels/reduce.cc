#include "kernels/reduce.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <type_traits>

#include "common/check.h"
#include "kernels/reduce_targets.h"

namespace reducer::kernels {
namespace {

// Inputs are taken in blocks of this size (a multiple of every element and of every vector). A
// block that lies across two pieces is copied together first: with pieces of the usual 8 KiB and
// more that is a small part of all bytes, and the loops see only long contiguous runs. Larger
// blocks copy more, smaller ones ask every input more often.
constexpr std::size_t kBlockBytes = 512;

// The longest run in one go: what it wrote is still in the cache if it has to be divided.
constexpr std::size_t kRunBytesMax = std::size_t{32} << 10;

/// Walks through a payload's pieces.
class Reader {
 public:
  explicit Reader(std::span<const Bytes> pieces) : pieces_(pieces) {}

  /// How many bytes follow without a break; at least one must be left.
  std::size_t contiguous() const { return pieces_.front().size() - at_; }

  /// The next `nbytes`, where they are, or if they lie in several pieces: copied to `scratch`.
  const std::uint8_t* take(std::size_t nbytes, std::uint8_t* scratch) {
    if (contiguous() < nbytes) {
      copy(scratch, nbytes);
      return scratch;
    }
    const std::byte* here = pieces_.front().data() + at_;
    skip(nbytes);
    return reinterpret_cast<const std::uint8_t*>(here);
  }

 private:
  void skip(std::size_t nbytes) {
    at_ += nbytes;
    if (at_ == pieces_.front().size()) {
      pieces_ = pieces_.subspan(1);
      at_ = 0;
    }
  }

  void copy(std::uint8_t* to, std::size_t nbytes) {
    while (nbytes > 0) {
      const std::size_t here = std::min(nbytes, contiguous());
      std::memcpy(to, pieces_.front().data() + at_, here);
      skip(here);
      to += here;
      nbytes -= here;
    }
  }

  std::span<const Bytes> pieces_;
  std::size_t at_ = 0;
};

std::uint8_t* raw(std::byte* bytes) { return reinterpret_cast<std::uint8_t*>(bytes); }

template <class T>
void divideIntegers(std::byte* out, std::size_t count, std::int64_t divisor) {
  // Unsigned in 64 bits: the upper half of uint64 has no room in int64.
  using Wide = std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>;
  for (std::size_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, out + i * sizeof(T), sizeof(T));
    value = static_cast<T>(static_cast<Wide>(value) / static_cast<Wide>(divisor));
    std::memcpy(out + i * sizeof(T), &value, sizeof(T));
  }
}

bool isInteger(DataType dtype) {
  return supports(ReduceOp::kBitAnd, dtype) && dtype != DataType::kBool;
}

/// `out` may be where the first reader reads.
void combine(DataType dtype, ReduceOp op, std::span<Reader> readers, std::byte* out,
             std::size_t count) {
  const std::size_t element = sizeOf(dtype);
  const std::size_t nbytes = count * element;
  const bool integer_mean = op == ReduceOp::kAvg && isInteger(dtype);
  std::vector<const std::uint8_t*> sources(readers.size());
  std::unique_ptr<std::uint8_t[]> scratch;
  for (std::size_t done = 0; done < nbytes;) {
    std::size_t run = std::min(nbytes - done, kRunBytesMax);
    for (const Reader& reader : readers) run = std::min(run, reader.contiguous());
    run -= run % kBlockBytes;
    if (run == 0) {
      run = std::min(nbytes - done, kBlockBytes);
      if (!scratch) {
        scratch = std::make_unique_for_overwrite<std::uint8_t[]>(readers.size() * kBlockBytes);
      }
    }
    for (std::size_t i = 0; i < readers.size(); ++i) {
      std::uint8_t* spare = scratch ? scratch.get() + i * kBlockBytes : nullptr;
      sources[i] = readers[i].take(run, spare);
    }
    std::byte* to = out + done;
    reduceContiguous(dtype, op, raw(to), sources.data(), sources.size(), run / element);
    if (integer_mean) divide(dtype, to, run / element, static_cast<std::int64_t>(readers.size()));
    done += run;
  }
}

}  // namespace

void reduce(DataType dtype, ReduceOp op, std::span<const Payload> inputs, std::byte* out,
            std::size_t count) {
  REDUCER_CHECK(!inputs.empty() && op != ReduceOp::kNone && supports(op, dtype));
  std::vector<Reader> readers;
  readers.reserve(inputs.size());
  for (const Payload& input : inputs) {
    REDUCER_CHECK(input.nbytes() == count * sizeOf(dtype));
    readers.emplace_back(input.pieces());
  }
  combine(dtype, op, readers, out, count);
}

void reduce(DataType dtype, ReduceOp op, std::span<const std::byte* const> inputs, std::byte* out,
            std::size_t count) {
  REDUCER_CHECK(!inputs.empty() && op != ReduceOp::kNone && supports(op, dtype));
  const auto* const sources = reinterpret_cast<const std::uint8_t* const*>(inputs.data());
  if (op != ReduceOp::kAvg || !isInteger(dtype)) {
    return reduceContiguous(dtype, op, raw(out), sources, inputs.size(), count);
  }
  const std::size_t run = kRunBytesMax / sizeOf(dtype);
  std::vector<const std::uint8_t*> here(sources, sources + inputs.size());
  for (std::size_t done = 0; done < count; done += run) {
    const std::size_t part = std::min(run, count - done);
    std::byte* const to = out + done * sizeOf(dtype);
    reduceContiguous(dtype, op, raw(to), here.data(), here.size(), part);
    divide(dtype, to, part, static_cast<std::int64_t>(inputs.size()));
    for (const std::uint8_t*& source : here) source += part * sizeOf(dtype);
  }
}

void accumulate(DataType dtype, ReduceOp op, std::byte* out, const Payload& in, std::size_t count) {
  REDUCER_CHECK(op != ReduceOp::kNone && supports(op, dtype));
  REDUCER_CHECK(in.nbytes() == count * sizeOf(dtype));
  op = partially(op, dtype);  // divide() follows
  const Bytes own(out, in.nbytes());
  Reader readers[] = {Reader({&own, 1}), Reader(in.pieces())};
  combine(dtype, op, readers, out, count);
}

void divide(DataType dtype, std::byte* out, std::size_t count, std::int64_t divisor) {
  REDUCER_CHECK(divisor > 0);
  switch (dtype) {
    case DataType::kInt8:
      return divideIntegers<std::int8_t>(out, count, divisor);
    case DataType::kInt16:
      return divideIntegers<std::int16_t>(out, count, divisor);
    case DataType::kInt32:
      return divideIntegers<std::int32_t>(out, count, divisor);
    case DataType::kInt64:
      return divideIntegers<std::int64_t>(out, count, divisor);
    case DataType::kUInt8:
      return divideIntegers<std::uint8_t>(out, count, divisor);
    case DataType::kUInt16:
      return divideIntegers<std::uint16_t>(out, count, divisor);
    case DataType::kUInt32:
      return divideIntegers<std::uint32_t>(out, count, divisor);
    case DataType::kUInt64:
      return divideIntegers<std::uint64_t>(out, count, divisor);
    case DataType::kBool:
      return;  // the mean of booleans is "and", which the accumulation did
    default:
      return divideFloating(dtype, raw(out), count, static_cast<std::size_t>(divisor));
  }
}

}  // namespace reducer::kernels
