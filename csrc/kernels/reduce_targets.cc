// Compiled once for each instruction set: foreach_target.h includes this file again and again.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/reduce_targets.cc"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <cstring>
#include <type_traits>

#include "kernels/half.h"
#include "kernels/reduce_targets.h"

HWY_BEFORE_NAMESPACE();
namespace reducer::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Sources = const std::uint8_t* const*;

// ---------------------------------------------------------------- how elements are loaded and stored
// Memory is loaded as bytes: pieces of the network have any alignment.

template <class T>
struct Plain {
  using Lane = T;
  static constexpr std::size_t kBytes = sizeof(T);
  template <class D>
  static hn::Vec<D> load(D d, const std::uint8_t* from) {
    return hn::BitCast(d, hn::LoadU(hn::Repartition<std::uint8_t, D>(), from));
  }
  template <class D>
  static void store(D /*d*/, hn::Vec<D> v, std::uint8_t* to) {
    const hn::Repartition<std::uint8_t, D> bytes;
    hn::StoreU(hn::BitCast(bytes, v), bytes, to);
  }
};

struct Bool {
  using Lane = std::uint8_t;
  static constexpr std::size_t kBytes = 1;
  template <class D>
  static hn::Vec<D> load(D d, const std::uint8_t* from) {
    const auto v = hn::LoadU(d, from);
    return hn::IfThenElseZero(hn::Ne(v, hn::Zero(d)), hn::Set(d, 1));
  }
  template <class D>
  static void store(D d, hn::Vec<D> v, std::uint8_t* to) {
    hn::StoreU(v, d, to);
  }
};

struct BFloat16 {
  using Lane = float;
  static constexpr std::size_t kBytes = 2;
  template <class D>
  static hn::Vec<D> load(D d, const std::uint8_t* from) {
    const hn::RebindToUnsigned<D> d32;
    const hn::Rebind<std::uint16_t, D> d16;
    const auto half = hn::BitCast(d16, hn::LoadU(hn::Repartition<std::uint8_t, decltype(d16)>(), from));
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, half)));
  }
  template <class D>
  static void store(D /*d*/, hn::Vec<D> v, std::uint8_t* to) {
    const hn::RebindToUnsigned<D> d32;
    const hn::RebindToSigned<D> i32;
    const hn::Rebind<std::uint16_t, D> d16;
    const auto bits = hn::BitCast(d32, v);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(d32, 0x7FFF)), odd));
    const auto quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(d32, 0x40));
    const auto is_nan = hn::Gt(hn::BitCast(i32, hn::And(bits, hn::Set(d32, 0x7FFFFFFF))), hn::Set(i32, 0x7F800000));
    const auto chosen = hn::IfThenElse(is_nan, hn::BitCast(i32, quiet), hn::BitCast(i32, rounded));
    const hn::Repartition<std::uint8_t, decltype(d16)> bytes;
    hn::StoreU(hn::BitCast(bytes, hn::DemoteTo(d16, chosen)), bytes, to);
  }
};

struct Float16 {
  using Lane = float;
  static constexpr std::size_t kBytes = 2;
#if HWY_TARGET <= HWY_AVX2  // these have conversion instructions
  template <class D>
  static hn::Vec<D> load(D d, const std::uint8_t* from) {
    const hn::Rebind<hwy::float16_t, D> d16;
    return hn::PromoteTo(d, hn::BitCast(d16, hn::LoadU(hn::Repartition<std::uint8_t, decltype(d16)>(), from)));
  }
  template <class D>
  static void store(D /*d*/, hn::Vec<D> v, std::uint8_t* to) {
    const hn::Rebind<hwy::float16_t, D> d16;
    const hn::Repartition<std::uint8_t, decltype(d16)> bytes;
    hn::StoreU(hn::BitCast(bytes, hn::DemoteTo(d16, v)), bytes, to);
  }
#else
  template <class D>
  static hn::Vec<D> load(D d, const std::uint8_t* from) {
    HWY_ALIGN float lanes[hn::MaxLanes(d)];
    for (std::size_t i = 0; i < hn::Lanes(d); ++i) {
      std::uint16_t half = 0;
      std::memcpy(&half, from + 2 * i, 2);
      lanes[i] = fromFloat16(half);
    }
    return hn::Load(d, lanes);
  }
  template <class D>
  static void store(D d, hn::Vec<D> v, std::uint8_t* to) {
    HWY_ALIGN float lanes[hn::MaxLanes(d)];
    hn::Store(v, d, lanes);
    for (std::size_t i = 0; i < hn::Lanes(d); ++i) {
      const std::uint16_t half = toFloat16(lanes[i]);
      std::memcpy(to + 2 * i, &half, 2);
    }
  }
#endif
};

// ---------------------------------------------------------------- operations on vectors

struct Sum {
  template <class D, class V>
  static V apply(D, V a, V b) {
    return hn::Add(a, b);
  }
};
struct Product {
  template <class D, class V>
  static V apply(D, V a, V b) {
    return hn::Mul(a, b);
  }
};
struct Max {
  template <class D, class V>
  static V apply(D, V a, V b) {
    if constexpr (hwy::IsFloat<hn::TFromD<D>>()) {
      return hn::IfThenElse(hn::Or(hn::Gt(b, a), hn::IsNaN(b)), b, a);
    } else {
      return hn::Max(a, b);
    }
  }
};
struct Min {
  template <class D, class V>
  static V apply(D, V a, V b) {
    if constexpr (hwy::IsFloat<hn::TFromD<D>>()) {
      return hn::IfThenElse(hn::Or(hn::Lt(b, a), hn::IsNaN(b)), b, a);
    } else {
      return hn::Min(a, b);
    }
  }
};
struct BitAnd {
  template <class D, class V>
  static V apply(D, V a, V b) {
    return hn::And(a, b);
  }
};
struct BitOr {
  template <class D, class V>
  static V apply(D, V a, V b) {
    return hn::Or(a, b);
  }
};
struct BitXor {
  template <class D, class V>
  static V apply(D, V a, V b) {
    return hn::Xor(a, b);
  }
};

// ---------------------------------------------------------------- the loop

template <class D>
hn::Vec<D> divided(D d, hn::Vec<D> v, std::size_t divisor) {
  if constexpr (hwy::IsFloat<hn::TFromD<D>>()) {
    if (divisor != 0) return hn::Div(v, hn::Set(d, static_cast<hn::TFromD<D>>(divisor)));
  }
  return v;
}

// All sources of a few vectors, then the next vectors: every source is read once, the result stays in registers
// and is written once.
template <class Element, class Op>
void loop(std::uint8_t* dst, Sources srcs, std::size_t sources, std::size_t count, std::size_t divisor) {
  const hn::ScalableTag<typename Element::Lane> d;
  const std::size_t n = hn::Lanes(d);
  const std::size_t step = n * Element::kBytes;
  std::size_t i = 0;
  for (; i + 4 * n <= count; i += 4 * n) {
    const std::size_t at = i * Element::kBytes;
    auto a = Element::load(d, srcs[0] + at);
    auto b = Element::load(d, srcs[0] + at + step);
    auto c = Element::load(d, srcs[0] + at + 2 * step);
    auto e = Element::load(d, srcs[0] + at + 3 * step);
    for (std::size_t s = 1; s < sources; ++s) {
      const std::uint8_t* from = srcs[s] + at;
      a = Op::apply(d, a, Element::load(d, from));
      b = Op::apply(d, b, Element::load(d, from + step));
      c = Op::apply(d, c, Element::load(d, from + 2 * step));
      e = Op::apply(d, e, Element::load(d, from + 3 * step));
    }
    Element::store(d, divided(d, a, divisor), dst + at);
    Element::store(d, divided(d, b, divisor), dst + at + step);
    Element::store(d, divided(d, c, divisor), dst + at + 2 * step);
    Element::store(d, divided(d, e, divisor), dst + at + 3 * step);
  }
  const hn::CappedTag<typename Element::Lane, 1> one;
  for (; i < count; ++i) {
    const std::size_t at = i * Element::kBytes;
    auto a = Element::load(one, srcs[0] + at);
    for (std::size_t s = 1; s < sources; ++s) a = Op::apply(one, a, Element::load(one, srcs[s] + at));
    Element::store(one, divided(one, a, divisor), dst + at);
  }
}

template <class T>
struct Complex {
  T re, im;
};

// Products that have no vector instruction everywhere.
template <class T>
T multiplied(T a, T b) {
  if constexpr (std::is_integral_v<T>) {
    return static_cast<T>(static_cast<std::uint64_t>(a) * static_cast<std::uint64_t>(b));
  } else {
    return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re};
  }
}

template <class T>
void scalarProduct(std::uint8_t* dst, Sources srcs, std::size_t sources, std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    T product;
    std::memcpy(&product, srcs[0] + i * sizeof(T), sizeof(T));
    for (std::size_t s = 1; s < sources; ++s) {
      T factor;
      std::memcpy(&factor, srcs[s] + i * sizeof(T), sizeof(T));
      product = multiplied(product, factor);
    }
    std::memcpy(dst + i * sizeof(T), &product, sizeof(T));
  }
}

template <class Element>
void floating(ReduceOp op, std::uint8_t* dst, Sources srcs, std::size_t sources, std::size_t count) {
  switch (op) {
    case ReduceOp::kSum:
      return loop<Element, Sum>(dst, srcs, sources, count, 0);
    case ReduceOp::kAvg:
      return loop<Element, Sum>(dst, srcs, sources, count, sources);
    case ReduceOp::kProduct:
      return loop<Element, Product>(dst, srcs, sources, count, 0);
    case ReduceOp::kMin:
      return loop<Element, Min>(dst, srcs, sources, count, 0);
    case ReduceOp::kMax:
      return loop<Element, Max>(dst, srcs, sources, count, 0);
    default:
      return;
  }
}

template <class T>
void integer(ReduceOp op, std::uint8_t* dst, Sources srcs, std::size_t sources, std::size_t count) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kAvg:
      return loop<Plain<T>, Sum>(dst, srcs, sources, count, 0);
    case ReduceOp::kProduct:
      return scalarProduct<T>(dst, srcs, sources, count);
    case ReduceOp::kMin:
      return loop<Plain<T>, Min>(dst, srcs, sources, count, 0);
    case ReduceOp::kMax:
      return loop<Plain<T>, Max>(dst, srcs, sources, count, 0);
    case ReduceOp::kBitAnd:
      return loop<Plain<T>, BitAnd>(dst, srcs, sources, count, 0);
    case ReduceOp::kBitOr:
      return loop<Plain<T>, BitOr>(dst, srcs, sources, count, 0);
    case ReduceOp::kBitXor:
      return loop<Plain<T>, BitXor>(dst, srcs, sources, count, 0);
    default:
      return;
  }
}

void boolean(ReduceOp op, std::uint8_t* dst, Sources srcs, std::size_t sources, std::size_t count) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kMax:
    case ReduceOp::kBitOr:
      return loop<Bool, BitOr>(dst, srcs, sources, count, 0);
    case ReduceOp::kBitXor:
      return loop<Bool, BitXor>(dst, srcs, sources, count, 0);
    default:
      return loop<Bool, BitAnd>(dst, srcs, sources, count, 0);
  }
}

template <class T>
void complex(ReduceOp op, std::uint8_t* dst, Sources srcs, std::size_t sources, std::size_t count) {
  if (op == ReduceOp::kProduct) return scalarProduct<Complex<T>>(dst, srcs, sources, count);
  floating<Plain<T>>(op, dst, srcs, sources, 2 * count);
}

void reduce(DataType dtype, ReduceOp op, std::uint8_t* dst, Sources srcs, std::size_t sources,
            std::size_t count) {
  switch (dtype) {
    case DataType::kFloat32:
      return floating<Plain<float>>(op, dst, srcs, sources, count);
    case DataType::kFloat64:
      return floating<Plain<double>>(op, dst, srcs, sources, count);
    case DataType::kFloat16:
      return floating<Float16>(op, dst, srcs, sources, count);
    case DataType::kBFloat16:
      return floating<BFloat16>(op, dst, srcs, sources, count);
    case DataType::kInt8:
      return integer<std::int8_t>(op, dst, srcs, sources, count);
    case DataType::kInt16:
      return integer<std::int16_t>(op, dst, srcs, sources, count);
    case DataType::kInt32:
      return integer<std::int32_t>(op, dst, srcs, sources, count);
    case DataType::kInt64:
      return integer<std::int64_t>(op, dst, srcs, sources, count);
    case DataType::kUInt8:
      return integer<std::uint8_t>(op, dst, srcs, sources, count);
    case DataType::kBool:
      return boolean(op, dst, srcs, sources, count);
    case DataType::kComplex64:
      return complex<float>(op, dst, srcs, sources, count);
    case DataType::kComplex128:
      return complex<double>(op, dst, srcs, sources, count);
  }
}

void divide(DataType dtype, std::uint8_t* dst, std::size_t count, std::size_t divisor) {
  const std::uint8_t* const self[] = {dst};
  switch (dtype) {
    case DataType::kFloat32:
      return loop<Plain<float>, Sum>(dst, self, 1, count, divisor);
    case DataType::kFloat64:
      return loop<Plain<double>, Sum>(dst, self, 1, count, divisor);
    case DataType::kFloat16:
      return loop<Float16, Sum>(dst, self, 1, count, divisor);
    case DataType::kBFloat16:
      return loop<BFloat16, Sum>(dst, self, 1, count, divisor);
    case DataType::kComplex64:
      return loop<Plain<float>, Sum>(dst, self, 1, 2 * count, divisor);
    case DataType::kComplex128:
      return loop<Plain<double>, Sum>(dst, self, 1, 2 * count, divisor);
    default:
      return;
  }
}

}  // namespace reducer::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reducer::kernels {
HWY_EXPORT(reduce);
HWY_EXPORT(divide);

void reduceContiguous(DataType dtype, ReduceOp op, std::uint8_t* dst, const std::uint8_t* const* srcs,
                      std::size_t sources, std::size_t count) {
  HWY_DYNAMIC_DISPATCH(reduce)(dtype, op, dst, srcs, sources, count);
}

void divideFloating(DataType dtype, std::uint8_t* dst, std::size_t count, std::size_t divisor) {
  HWY_DYNAMIC_DISPATCH(divide)(dtype, dst, count, divisor);
}

}  // namespace reducer::kernels
#endif
