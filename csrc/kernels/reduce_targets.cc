// Compiled once for each instruction set: foreach_target.h includes this file again and again.
#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/reduce_targets.cc"
#include "kernels/reduce_targets.h"

#include <hwy/cache_control.h>
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/float8.h"
#include "kernels/reduce.h"

HWY_BEFORE_NAMESPACE();
namespace reducer::kernels::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Sources = const std::uint8_t* const*;

// ---------------------------------------------------------------- loading and storing elements
//
// The loops work in units of two vectors of lanes. An element type says how many bytes one element
// has in memory, and how a unit is loaded and stored; which lane an element goes to does not
// matter, as long as it comes back. Memory is loaded as bytes: what the network delivers has any
// alignment.

template <class D>
hn::Vec<D> loadBytes(D d, const std::uint8_t* from) {
  return hn::BitCast(d, hn::LoadU(hn::Repartition<std::uint8_t, D>(), from));
}

template <class D>
void storeBytes(D d, hn::Vec<D> v, std::uint8_t* to) {
  const hn::Repartition<std::uint8_t, D> bytes;
  hn::StoreU(hn::BitCast(bytes, v), bytes, to);
}

template <class T>
struct Plain {
  using Lane = T;
  static constexpr std::size_t kBytes = sizeof(T);
  template <class D, class V>
  static void load(D d, const std::uint8_t* from, V& a, V& b) {
    a = loadBytes(d, from);
    b = loadBytes(d, from + hn::Lanes(d) * sizeof(T));
  }
  template <class D, class V>
  static void store(D d, V a, V b, std::uint8_t* to) {
    storeBytes(d, a, to);
    storeBytes(d, b, to + hn::Lanes(d) * sizeof(T));
  }
};

struct Bool {
  using Lane = std::uint8_t;
  static constexpr std::size_t kBytes = 1;
  template <class D, class V>
  static void load(D d, const std::uint8_t* from, V& a, V& b) {
    const auto one = hn::Set(d, 1);
    Plain<Lane>::load(d, from, a, b);
    a = hn::Min(a, one);
    b = hn::Min(b, one);
  }
  template <class D, class V>
  static void store(D d, V a, V b, std::uint8_t* to) {
    Plain<Lane>::store(d, a, b, to);
  }
};

// Of two halves in a 32-bit lane the first goes to one vector and the second to the other: no lane
// is crossed.
struct BFloat16 {
  using Lane = float;
  static constexpr std::size_t kBytes = 2;
  template <class D, class V>
  static void load(D d, const std::uint8_t* from, V& a, V& b) {
    const hn::RebindToUnsigned<D> d32;
    const auto both = loadBytes(d32, from);
    a = hn::BitCast(d, hn::ShiftLeft<16>(both));
    b = hn::BitCast(d, hn::And(both, hn::Set(d32, 0xFFFF0000u)));
  }
  template <class D, class V>
  static void store(D d, V a, V b, std::uint8_t* to) {
    const hn::RebindToUnsigned<D> d32;
    const auto upper = hn::And(rounded(d, b), hn::Set(d32, 0xFFFF0000u));
    storeBytes(d32, hn::Or(hn::ShiftRight<16>(rounded(d, a)), upper), to);
  }

 private:
  /// To nearest even in the upper 16 bits. Infinity stays, and so does the NaN of settled().
  template <class D>
  static hn::Vec<hn::RebindToUnsigned<D>> rounded(D /*d*/, hn::Vec<D> v) {
    const hn::RebindToUnsigned<D> d32;
    const auto bits = hn::BitCast(d32, v);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
    return hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7FFF)));
  }
};

struct Float16 {
  using Lane = float;
  static constexpr std::size_t kBytes = 2;
#if HWY_TARGET <= HWY_AVX2  // these have conversion instructions
  template <class D, class V>
  static void load(D d, const std::uint8_t* from, V& a, V& b) {
    const hn::Rebind<hwy::float16_t, D> d16;
    a = hn::PromoteTo(d, loadBytes(d16, from));
    b = hn::PromoteTo(d, loadBytes(d16, from + hn::Lanes(d) * kBytes));
  }
  template <class D, class V>
  static void store(D /*d*/, V a, V b, std::uint8_t* to) {
    const hn::Rebind<hwy::float16_t, D> d16;
    storeBytes(d16, hn::DemoteTo(d16, a), to);
    storeBytes(d16, hn::DemoteTo(d16, b), to + hn::Lanes(d16) * kBytes);
  }
#else
  template <class D, class V>
  static void load(D d, const std::uint8_t* from, V& a, V& b) {
    const hn::RebindToSigned<D> i32;
    const hn::RebindToUnsigned<D> d32;
    const auto both = loadBytes(d32, from);
    a = widened(d, hn::BitCast(i32, hn::And(both, hn::Set(d32, 0xFFFF))));
    b = widened(d, hn::BitCast(i32, hn::ShiftRight<16>(both)));
  }
  template <class D, class V>
  static void store(D d, V a, V b, std::uint8_t* to) {
    const hn::RebindToSigned<D> i32;
    storeBytes(i32, hn::Or(narrowed(d, a), hn::ShiftLeft<16>(narrowed(d, b))), to);
  }

 private:
  template <class D>
  static hn::Vec<D> widened(D d, hn::Vec<hn::RebindToSigned<D>> half) {
    const hn::RebindToSigned<D> i32;
    const auto magnitude = hn::And(half, hn::Set(i32, 0x7FFF));
    const auto sign = hn::ShiftLeft<16>(hn::Xor(half, magnitude));
    const auto bias = hn::Set(i32, 112 << 23);
    const auto normal = hn::Add(hn::ShiftLeft<13>(magnitude), bias);
    // An exponent of all ones becomes one of all ones: infinity and NaN.
    const auto is_normal = hn::Lt(magnitude, hn::Set(i32, 0x7C00));
    const auto large = hn::IfThenElse(is_normal, normal, hn::Add(normal, bias));
    // Zero and subnormals are a whole number of 2^-24.
    const auto small = hn::Mul(hn::ConvertTo(d, magnitude), hn::Set(d, 0x1p-24f));
    const auto is_small = hn::Lt(magnitude, hn::Set(i32, 0x0400));
    return hn::BitCast(d, hn::Or(sign, hn::IfThenElse(is_small, hn::BitCast(i32, small), large)));
  }

  template <class D>
  static hn::Vec<hn::RebindToSigned<D>> narrowed(D d, hn::Vec<D> v) {
    const hn::RebindToSigned<D> i32;
    const auto bits = hn::BitCast(i32, v);
    const auto magnitude = hn::And(bits, hn::Set(i32, 0x7FFFFFFF));
    const auto sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(i32, 0x8000));
    // To nearest even in the upper bits, then another bias; what is too large becomes infinity.
    const auto odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(i32, 1));
    const auto rounded = hn::ShiftRight<13>(hn::Add(magnitude, hn::Add(odd, hn::Set(i32, 0xFFF))));
    const auto large = hn::Min(hn::Sub(rounded, hn::Set(i32, 112 << 10)), hn::Set(i32, 0x7C00));
    // Below 2^-14: the last place of a float near 0.5 is 2^-24, so the addition rounds.
    const auto half = hn::Set(d, 0.5f);
    const auto sum = hn::Add(hn::BitCast(d, magnitude), half);
    const auto small = hn::Sub(hn::BitCast(i32, sum), hn::BitCast(i32, half));
    const auto is_small = hn::Lt(magnitude, hn::Set(i32, 0x38800000));
    const auto number = hn::IfThenElse(is_small, small, large);
    const auto is_nan = hn::Gt(magnitude, hn::Set(i32, 0x7F800000));
    return hn::Or(sign, hn::IfThenElse(is_nan, hn::Set(i32, 0x7E00), number));
  }
#endif
};

// A vector of bytes is a quarter as long as one of lanes.
template <class Format>
struct Float8 {
  using Lane = float;
  using Bits = Float8Bits<Format>;
  static constexpr std::size_t kBytes = 1;
  template <class D, class V>
  static void load(D d, const std::uint8_t* from, V& a, V& b) {
    a = widened(d, from);
    b = widened(d, from + hn::Lanes(d));
  }
  template <class D, class V>
  static void store(D d, V a, V b, std::uint8_t* to) {
    narrowed(d, a, to);
    narrowed(d, b, to + hn::Lanes(d));
  }

 private:
  template <class D>
  static hn::Vec<D> widened(D d, const std::uint8_t* from) {
    const hn::RebindToSigned<D> i32;
    const auto byte = hn::PromoteTo(i32, loadBytes(hn::Rebind<std::uint8_t, D>(), from));
    const auto magnitude = hn::And(byte, hn::Set(i32, 0x7F));
    const auto sign = hn::ShiftLeft<24>(hn::Xor(byte, magnitude));
    const auto shifted = hn::ShiftLeft<Bits::kShift>(magnitude);
    const auto normal = hn::Add(shifted, hn::Set(i32, Bits::kRebias << 23));
    // Infinity and NaN have an exponent of all ones there too.
    const auto is_special = hn::Gt(magnitude, hn::Set(i32, Format::kLargestFinite));
    const auto special = hn::Or(shifted, hn::Set(i32, 0x7F800000));
    const auto large = hn::IfThenElse(is_special, special, normal);
    const auto small = hn::Mul(hn::ConvertTo(d, magnitude), hn::Set(d, Bits::kUnit));
    const auto is_small = hn::Lt(magnitude, hn::Set(i32, 1 << Format::kFractionBits));
    return hn::BitCast(d, hn::Or(sign, hn::IfThenElse(is_small, hn::BitCast(i32, small), large)));
  }

  template <class D>
  static void narrowed(D d, hn::Vec<D> v, std::uint8_t* to) {
    const hn::RebindToSigned<D> i32;
    const auto set = [i32](std::int64_t bits) {
      return hn::Set(i32, static_cast<std::int32_t>(bits));
    };
    const auto magnitude = hn::And(hn::BitCast(i32, v), set(0x7FFFFFFF));
    const auto sign = hn::And(hn::ShiftRight<24>(hn::BitCast(i32, v)), set(0x80));
    // To nearest even in the upper bits, then another bias; what is too large is cut off.
    const auto odd = hn::And(hn::ShiftRight<Bits::kShift>(magnitude), set(1));
    const auto raised = hn::Add(magnitude, hn::Add(odd, set((1 << (Bits::kShift - 1)) - 1)));
    const auto rounded =
        hn::Sub(hn::ShiftRight<Bits::kShift>(raised), set(Bits::kRebias << Format::kFractionBits));
    const auto large = hn::Min(rounded, set(Format::kOverflow));
    // Below the smallest normal number an addition rounds.
    const auto rounder = set(Bits::kRounder);
    const auto sum = hn::Add(hn::BitCast(d, magnitude), hn::BitCast(d, rounder));
    const auto small = hn::Sub(hn::BitCast(i32, sum), rounder);
    const auto is_small = hn::Lt(magnitude, set(Bits::kSmallestNormal));
    const auto number = hn::Or(sign, hn::IfThenElse(is_small, small, large));
    const auto is_nan = hn::Gt(magnitude, set(0x7F800000));
    const auto byte = hn::IfThenElse(is_nan, set(kFloat8Nan), number);
    const hn::Rebind<std::uint8_t, D> d8;
    storeBytes(d8, hn::DemoteTo(d8, byte), to);
  }
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
  static V apply(D d, V a, V b) {
    using T = hn::TFromD<D>;
    if constexpr (std::is_integral_v<T> && sizeof(T) == 1) {
      const hn::Repartition<std::uint16_t, D> wide;
      const auto low = hn::Set(wide, 0x00FF);
      const auto a16 = hn::BitCast(wide, a);
      const auto b16 = hn::BitCast(wide, b);
      const auto even = hn::And(hn::Mul(a16, b16), low);
      const auto odd = hn::Mul(hn::ShiftRight<8>(a16), hn::AndNot(low, b16));
      return hn::BitCast(d, hn::Or(even, odd));
    } else if constexpr (std::is_integral_v<T> && sizeof(T) == 8) {
      // Of (2^32 a1 + a0) (2^32 b1 + b0) what is below 2^64.
      const hn::RebindToUnsigned<D> d64;
      const hn::Repartition<std::uint32_t, D> d32;
      const auto a0 = hn::BitCast(d32, a);
      const auto b0 = hn::BitCast(d32, b);
      const auto a1 = hn::BitCast(d32, hn::ShiftRight<32>(hn::BitCast(d64, a)));
      const auto b1 = hn::BitCast(d32, hn::ShiftRight<32>(hn::BitCast(d64, b)));
      const auto cross = hn::ShiftLeft<32>(hn::Add(hn::MulEven(a0, b1), hn::MulEven(a1, b0)));
      return hn::BitCast(d, hn::Add(hn::MulEven(a0, b0), cross));
    } else {
      return hn::Mul(a, b);
    }
  }
};
struct ComplexProduct {
  /// Real parts in even lanes, imaginary ones in odd lanes.
  template <class D, class V>
  static V apply(D d, V a, V b) {
    const auto minus = hn::OddEven(hn::Zero(d), hn::SignBit(d));
    const auto straight = hn::Mul(hn::DupEven(a), b);
    const auto crossed = hn::Mul(hn::DupOdd(a), hn::Reverse2(d, b));
    return hn::Add(straight, hn::Xor(crossed, minus));
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

/// What an accumulator becomes before it is stored: divided (divisor != 0), and a NaN the one NaN.
template <class D>
hn::Vec<D> settled(D d, hn::Vec<D> v, std::size_t divisor) {
  using T = hn::TFromD<D>;
  if constexpr (hwy::IsFloat<T>()) {
    if (divisor != 0) v = hn::Div(v, hn::Set(d, static_cast<T>(divisor)));
    v = hn::IfThenElse(hn::IsNaN(v), hn::Set(d, std::numeric_limits<T>::quiet_NaN()), v);
  }
  return v;
}

// The hardware stops at every page of every source; this reaches into the next one. Behind the end
// of a source it reads nothing and harms nothing.
constexpr std::size_t kPrefetchBytes = 2048;

/// The lines of `kBytes`, at most 256, from `from` on.
template <std::size_t kBytes>
HWY_INLINE void prefetch(const std::uint8_t* from) {
  hwy::Prefetch(from);
  if constexpr (kBytes > 64) hwy::Prefetch(from + 64);
  if constexpr (kBytes > 128) hwy::Prefetch(from + 128);
  if constexpr (kBytes > 192) hwy::Prefetch(from + 192);
}

/// All sources of a few vectors, then the next vectors: every source is read once, the result stays
/// in registers and is written once.
template <class Element, class Op>
void loop(std::uint8_t* dst, Sources srcs, std::size_t sources, std::size_t count,
          std::size_t divisor) {
  const hn::ScalableTag<typename Element::Lane> d;
  using V = hn::Vec<decltype(d)>;
  const std::size_t unit = 2 * hn::Lanes(d) * Element::kBytes;
  const std::size_t nbytes = count * Element::kBytes;
  constexpr std::size_t kTurn = 4 * hn::MaxLanes(d) * Element::kBytes;
  V a0, a1, a2, a3, b0, b1, b2, b3;
  std::size_t at = 0;
  for (; at + 2 * unit <= nbytes; at += 2 * unit) {
    Element::load(d, srcs[0] + at, a0, a1);
    Element::load(d, srcs[0] + at + unit, a2, a3);
    prefetch<kTurn>(srcs[0] + at + kPrefetchBytes);
    for (std::size_t s = 1; s < sources; ++s) {
      Element::load(d, srcs[s] + at, b0, b1);
      Element::load(d, srcs[s] + at + unit, b2, b3);
      prefetch<kTurn>(srcs[s] + at + kPrefetchBytes);
      a0 = Op::apply(d, a0, b0);
      a1 = Op::apply(d, a1, b1);
      a2 = Op::apply(d, a2, b2);
      a3 = Op::apply(d, a3, b3);
    }
    Element::store(d, settled(d, a0, divisor), settled(d, a1, divisor), dst + at);
    Element::store(d, settled(d, a2, divisor), settled(d, a3, divisor), dst + at + unit);
  }
  // The rest is at most two units; the last may be a part of one, filled up with zeros.
  HWY_ALIGN std::uint8_t padded[2 * hn::MaxLanes(d) * Element::kBytes] = {};
  for (; at < nbytes; at += unit) {
    const std::size_t part = HWY_MIN(unit, nbytes - at);
    std::memcpy(padded, srcs[0] + at, part);
    Element::load(d, padded, a0, a1);
    for (std::size_t s = 1; s < sources; ++s) {
      std::memcpy(padded, srcs[s] + at, part);
      Element::load(d, padded, b0, b1);
      a0 = Op::apply(d, a0, b0);
      a1 = Op::apply(d, a1, b1);
    }
    Element::store(d, settled(d, a0, divisor), settled(d, a1, divisor), padded);
    std::memcpy(dst + at, padded, part);
  }
}

// ---------------------------------------------------------------- which loop

template <class Element>
void floating(ReduceOp op, std::uint8_t* dst, Sources srcs, std::size_t sources,
              std::size_t count) {
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
  using Bits = Plain<std::uint8_t>;
  const std::size_t nbytes = count * sizeof(T);
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kAvg:
      return loop<Plain<T>, Sum>(dst, srcs, sources, count, 0);
    case ReduceOp::kProduct:
      return loop<Plain<T>, Product>(dst, srcs, sources, count, 0);
    case ReduceOp::kMin:
      return loop<Plain<T>, Min>(dst, srcs, sources, count, 0);
    case ReduceOp::kMax:
      return loop<Plain<T>, Max>(dst, srcs, sources, count, 0);
    case ReduceOp::kBitAnd:
      return loop<Bits, BitAnd>(dst, srcs, sources, nbytes, 0);
    case ReduceOp::kBitOr:
      return loop<Bits, BitOr>(dst, srcs, sources, nbytes, 0);
    case ReduceOp::kBitXor:
      return loop<Bits, BitXor>(dst, srcs, sources, nbytes, 0);
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

/// Sums and means go part by part.
template <class T>
void complex(ReduceOp op, std::uint8_t* dst, Sources srcs, std::size_t sources, std::size_t count) {
  const std::size_t parts = 2 * count;
  if (op == ReduceOp::kProduct) {
    return loop<Plain<T>, ComplexProduct>(dst, srcs, sources, parts, 0);
  }
  loop<Plain<T>, Sum>(dst, srcs, sources, parts, op == ReduceOp::kAvg ? sources : 0);
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
    case DataType::kFloat8E4M3FN:
      return floating<Float8<E4M3FN>>(op, dst, srcs, sources, count);
    case DataType::kFloat8E5M2:
      return floating<Float8<E5M2>>(op, dst, srcs, sources, count);
    case DataType::kUInt16:
      return integer<std::uint16_t>(op, dst, srcs, sources, count);
    case DataType::kUInt32:
      return integer<std::uint32_t>(op, dst, srcs, sources, count);
    case DataType::kUInt64:
      return integer<std::uint64_t>(op, dst, srcs, sources, count);
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
    case DataType::kFloat8E4M3FN:
      return loop<Float8<E4M3FN>, Sum>(dst, self, 1, count, divisor);
    case DataType::kFloat8E5M2:
      return loop<Float8<E5M2>, Sum>(dst, self, 1, count, divisor);
    default:
      return;
  }
}

/// Loads as From and stores as To.
template <class From, class To>
void convert(const std::uint8_t* in, std::uint8_t* out, std::size_t count) {
  const hn::ScalableTag<float> d;
  const std::size_t unit = 2 * hn::Lanes(d);
  HWY_ALIGN std::uint8_t padded[2 * hn::MaxLanes(d) * sizeof(float)] = {};
  hn::Vec<decltype(d)> a, b;
  for (std::size_t at = 0; at < count; at += unit) {
    const std::size_t part = HWY_MIN(unit, count - at);
    std::memcpy(padded, in + at * From::kBytes, part * From::kBytes);
    From::load(d, padded, a, b);
    To::store(d, a, b, padded);
    std::memcpy(out + at * To::kBytes, padded, part * To::kBytes);
  }
}

void widen(DataType dtype, const std::uint8_t* in, std::uint8_t* out, std::size_t count) {
  if (dtype == DataType::kFloat8E4M3FN)
    return convert<Float8<E4M3FN>, Plain<float>>(in, out, count);
  convert<Float8<E5M2>, Plain<float>>(in, out, count);
}

void narrow(DataType dtype, const std::uint8_t* in, std::uint8_t* out, std::size_t count) {
  if (dtype == DataType::kFloat8E4M3FN)
    return convert<Plain<float>, Float8<E4M3FN>>(in, out, count);
  convert<Plain<float>, Float8<E5M2>>(in, out, count);
}

}  // namespace reducer::kernels::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace reducer::kernels {
HWY_EXPORT(reduce);
HWY_EXPORT(divide);
HWY_EXPORT(widen);
HWY_EXPORT(narrow);

void reduceContiguous(DataType dtype, ReduceOp op, std::uint8_t* dst,
                      const std::uint8_t* const* srcs, std::size_t sources, std::size_t count) {
  HWY_DYNAMIC_DISPATCH(reduce)(dtype, op, dst, srcs, sources, count);
}

void divideFloating(DataType dtype, std::uint8_t* dst, std::size_t count, std::size_t divisor) {
  HWY_DYNAMIC_DISPATCH(divide)(dtype, dst, count, divisor);
}

void widenFloat8(DataType dtype, const std::uint8_t* in, float* out, std::size_t count) {
  HWY_DYNAMIC_DISPATCH(widen)(dtype, in, reinterpret_cast<std::uint8_t*>(out), count);
}

void narrowFloat8(DataType dtype, const float* in, std::uint8_t* out, std::size_t count) {
  HWY_DYNAMIC_DISPATCH(narrow)(dtype, reinterpret_cast<const std::uint8_t*>(in), out, count);
}

}  // namespace reducer::kernels
#endif
