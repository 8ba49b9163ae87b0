// The reference that tests compare with: one element at a time, written to be read.
#include <cmath>
#include <complex>
#include <cstring>
#include <limits>
#include <type_traits>

#include "common/check.h"
#include "kernels/float8.h"
#include "kernels/half.h"
#include "kernels/reduce.h"

namespace reducer::kernels {
namespace {

template <class T>
struct Identity {
  using Stored = T;
  using Number = T;
  static Number load(Stored stored) { return stored; }
  static Stored store(Number number) { return number; }
};
struct ScalarFloat16 {
  using Stored = std::uint16_t;
  using Number = float;
  static Number load(Stored stored) { return fromFloat16(stored); }
  static Stored store(Number number) { return toFloat16(number); }
};
struct ScalarBFloat16 {
  using Stored = std::uint16_t;
  using Number = float;
  static Number load(Stored stored) { return fromBFloat16(stored); }
  static Stored store(Number number) { return toBFloat16(number); }
};
template <class Format>
struct ScalarFloat8 {
  using Stored = std::uint8_t;
  using Number = float;
  static Number load(Stored stored) { return fromFloat8<Format>(stored); }
  static Stored store(Number number) { return toFloat8<Format>(number); }
};
struct ScalarBool {
  using Stored = std::uint8_t;
  using Number = bool;
  static Number load(Stored stored) { return stored != 0; }
  static Stored store(Number number) { return number ? 1 : 0; }
};

template <class T>
inline constexpr bool kIsComplex = false;
template <class T>
inline constexpr bool kIsComplex<std::complex<T>> = true;

/// Which of two NaNs survives an addition is the compiler's choice, so all NaNs become one.
template <class T>
T settled(T value) {
  if constexpr (kIsComplex<T>) {
    return {settled(value.real()), settled(value.imag())};
  } else if constexpr (std::is_floating_point_v<T>) {
    return std::isnan(value) ? std::numeric_limits<T>::quiet_NaN() : value;
  } else {
    return value;
  }
}

template <class T>
T add(T a, T b) {
  if constexpr (std::is_same_v<T, bool>) {
    return a || b;
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
  } else {
    return a + b;
  }
}

template <class T>
T multiply(T a, T b) {
  if constexpr (std::is_same_v<T, bool>) {
    return a && b;
  } else if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
  } else if constexpr (kIsComplex<T>) {
    return {a.real() * b.real() - a.imag() * b.imag(), a.real() * b.imag() + a.imag() * b.real()};
  } else {
    return a * b;
  }
}

template <class T>
T combine(ReduceOp op, T a, T b) {
  if (op == ReduceOp::kAvg && std::is_same_v<T, bool>) return multiply(a, b);
  if (op == ReduceOp::kSum || op == ReduceOp::kAvg) return add(a, b);
  if (op == ReduceOp::kProduct) return multiply(a, b);
  if constexpr (!kIsComplex<T>) {
    if constexpr (std::is_floating_point_v<T>) {
      if (std::isnan(a)) return a;
      if (std::isnan(b)) return b;
    }
    if (op == ReduceOp::kMin) return b < a ? b : a;
    if (op == ReduceOp::kMax) return b > a ? b : a;
  }
  if constexpr (std::is_integral_v<T>) {
    if (op == ReduceOp::kBitAnd) return static_cast<T>(a & b);
    if (op == ReduceOp::kBitOr) return static_cast<T>(a | b);
    if (op == ReduceOp::kBitXor) return static_cast<T>(a ^ b);
  }
  REDUCER_CHECK(false);
}

template <class T>
T divideBy(T value, std::size_t divisor) {
  if constexpr (std::is_same_v<T, bool>) {
    return value;
  } else if constexpr (std::is_integral_v<T>) {
    using Wide = std::conditional_t<std::is_signed_v<T>, std::int64_t, std::uint64_t>;
    return static_cast<T>(static_cast<Wide>(value) / static_cast<Wide>(divisor));
  } else if constexpr (kIsComplex<T>) {
    using Part = typename T::value_type;
    return {value.real() / static_cast<Part>(divisor), value.imag() / static_cast<Part>(divisor)};
  } else {
    return value / static_cast<T>(divisor);
  }
}

template <class Element>
void run(ReduceOp op, std::span<const Payload> inputs, std::byte* out, std::size_t count) {
  using Stored = typename Element::Stored;
  std::vector<std::vector<Stored>> values;
  for (const Payload& input : inputs) {
    values.emplace_back(count);
    input.copyTo(reinterpret_cast<std::byte*>(values.back().data()));
  }
  for (std::size_t i = 0; i < count; ++i) {
    auto accumulator = Element::load(values[0][i]);
    for (std::size_t r = 1; r < values.size(); ++r) {
      accumulator = combine(op, accumulator, Element::load(values[r][i]));
    }
    if (op == ReduceOp::kAvg) accumulator = divideBy(accumulator, inputs.size());
    const Stored stored = Element::store(settled(accumulator));
    std::memcpy(out + i * sizeof(Stored), &stored, sizeof(Stored));
  }
}

}  // namespace

void reduceScalar(DataType dtype, ReduceOp op, std::span<const Payload> inputs, std::byte* out,
                  std::size_t count) {
  switch (dtype) {
    case DataType::kFloat32:
      return run<Identity<float>>(op, inputs, out, count);
    case DataType::kFloat64:
      return run<Identity<double>>(op, inputs, out, count);
    case DataType::kFloat16:
      return run<ScalarFloat16>(op, inputs, out, count);
    case DataType::kBFloat16:
      return run<ScalarBFloat16>(op, inputs, out, count);
    case DataType::kInt8:
      return run<Identity<std::int8_t>>(op, inputs, out, count);
    case DataType::kInt16:
      return run<Identity<std::int16_t>>(op, inputs, out, count);
    case DataType::kInt32:
      return run<Identity<std::int32_t>>(op, inputs, out, count);
    case DataType::kInt64:
      return run<Identity<std::int64_t>>(op, inputs, out, count);
    case DataType::kUInt8:
      return run<Identity<std::uint8_t>>(op, inputs, out, count);
    case DataType::kBool:
      return run<ScalarBool>(op, inputs, out, count);
    case DataType::kComplex64:
      return run<Identity<std::complex<float>>>(op, inputs, out, count);
    case DataType::kComplex128:
      return run<Identity<std::complex<double>>>(op, inputs, out, count);
    case DataType::kFloat8E4M3FN:
      return run<ScalarFloat8<E4M3FN>>(op, inputs, out, count);
    case DataType::kFloat8E5M2:
      return run<ScalarFloat8<E5M2>>(op, inputs, out, count);
    case DataType::kUInt16:
      return run<Identity<std::uint16_t>>(op, inputs, out, count);
    case DataType::kUInt32:
      return run<Identity<std::uint32_t>>(op, inputs, out, count);
    case DataType::kUInt64:
      return run<Identity<std::uint64_t>>(op, inputs, out, count);
  }
}

}  // namespace reducer::kernels
