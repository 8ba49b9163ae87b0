#include "kernels/reduce.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "common/check.h"
#include "kernels/reduce_targets.h"

namespace reducer::kernels {
namespace {

constexpr std::size_t kElementBytesMax = 16;

/// Walks through a payload's pieces.
class Reader {
 public:
  explicit Reader(const Payload& payload) : pieces_(payload.pieces()) {}

  /// What is left of the current piece.
  Bytes run() const { return pieces_.empty() ? Bytes() : pieces_.front().subspan(at_); }

  void skip(std::size_t nbytes) {
    at_ += nbytes;
    if (at_ == pieces_.front().size()) {
      pieces_ = pieces_.subspan(1);
      at_ = 0;
    }
  }

  void copy(std::uint8_t* to, std::size_t nbytes) {
    while (nbytes > 0) {
      const Bytes here = run().first(std::min(nbytes, run().size()));
      std::memcpy(to, here.data(), here.size());
      skip(here.size());
      to += here.size();
      nbytes -= here.size();
    }
  }

 private:
  std::span<const Bytes> pieces_;
  std::size_t at_ = 0;
};

std::uint8_t* raw(std::byte* bytes) { return reinterpret_cast<std::uint8_t*>(bytes); }
const std::uint8_t* raw(const std::byte* bytes) { return reinterpret_cast<const std::uint8_t*>(bytes); }

template <class T>
void divideIntegers(std::byte* out, std::size_t count, std::int64_t divisor) {
  for (std::size_t i = 0; i < count; ++i) {
    T value;
    std::memcpy(&value, out + i * sizeof(T), sizeof(T));
    value = static_cast<T>(static_cast<std::int64_t>(value) / divisor);
    std::memcpy(out + i * sizeof(T), &value, sizeof(T));
  }
}

bool isInteger(DataType dtype) { return supports(ReduceOp::kBitAnd, dtype) && dtype != DataType::kBool; }

}  // namespace

void reduce(DataType dtype, ReduceOp op, std::span<const Payload> inputs, std::byte* out, std::size_t count) {
  REDUCER_CHECK(!inputs.empty() && op != ReduceOp::kNone && supports(op, dtype));
  const std::size_t element = sizeOf(dtype);
  std::vector<Reader> readers;
  readers.reserve(inputs.size());
  for (const Payload& input : inputs) {
    REDUCER_CHECK(input.nbytes() == count * element);
    readers.emplace_back(input);
  }
  std::vector<const std::uint8_t*> sources(inputs.size());
  std::vector<std::uint8_t> straddling;
  for (std::size_t done = 0; done < count;) {
    // As far as every input goes without a break; if one breaks within an element, that element is put together.
    std::size_t run = (count - done) * element;
    for (const Reader& reader : readers) run = std::min(run, reader.run().size());
    std::size_t elements = run / element;
    if (elements > 0) {
      for (std::size_t i = 0; i < readers.size(); ++i) {
        sources[i] = raw(readers[i].run().data());
        readers[i].skip(elements * element);
      }
    } else {
      elements = 1;
      straddling.resize(readers.size() * kElementBytesMax);
      for (std::size_t i = 0; i < readers.size(); ++i) {
        std::uint8_t* whole = straddling.data() + i * kElementBytesMax;
        readers[i].copy(whole, element);
        sources[i] = whole;
      }
    }
    reduceContiguous(dtype, op, raw(out) + done * element, sources.data(), sources.size(), elements);
    done += elements;
  }
  if (op == ReduceOp::kAvg && isInteger(dtype)) {
    divide(dtype, out, count, static_cast<std::int64_t>(inputs.size()));
  }
}

void accumulate(DataType dtype, ReduceOp op, std::byte* out, const Payload& in, std::size_t count) {
  REDUCER_CHECK(op != ReduceOp::kNone && supports(op, dtype) && in.nbytes() == count * sizeOf(dtype));
  if (op == ReduceOp::kAvg) op = dtype == DataType::kBool ? ReduceOp::kBitAnd : ReduceOp::kSum;
  const std::size_t element = sizeOf(dtype);
  Reader reader(in);
  std::array<std::uint8_t, kElementBytesMax> straddling;
  for (std::size_t done = 0; done < count;) {
    std::size_t elements = reader.run().size() / element;
    std::uint8_t* to = raw(out) + done * element;
    const std::uint8_t* sources[] = {to, raw(reader.run().data())};
    if (elements > 0) {
      reader.skip(elements * element);
    } else {
      elements = 1;
      reader.copy(straddling.data(), element);
      sources[1] = straddling.data();
    }
    reduceContiguous(dtype, op, to, sources, 2, elements);
    done += elements;
  }
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
    case DataType::kBool:
      return;  // the mean of booleans is "and", which the accumulation did
    default:
      return divideFloating(dtype, raw(out), count, static_cast<std::size_t>(divisor));
  }
}

}  // namespace reducer::kernels
