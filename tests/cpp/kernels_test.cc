#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <complex>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>

#include "kernels/float8.h"
#include "kernels/half.h"
#include "kernels/reduce.h"

namespace reducer::kernels {
namespace {

constexpr DataType kTypes[] = {
    DataType::kFloat32,      DataType::kFloat64,    DataType::kFloat16,   DataType::kBFloat16,
    DataType::kInt8,         DataType::kInt16,      DataType::kInt32,     DataType::kInt64,
    DataType::kUInt8,        DataType::kBool,       DataType::kComplex64, DataType::kComplex128,
    DataType::kFloat8E4M3FN, DataType::kFloat8E5M2, DataType::kUInt16,    DataType::kUInt32,
    DataType::kUInt64};
static_assert(std::size(kTypes) == static_cast<std::size_t>(kLastDataType), "a type is missing");
constexpr DataType kFloat8Types[] = {DataType::kFloat8E4M3FN, DataType::kFloat8E5M2};
constexpr ReduceOp kOps[] = {ReduceOp::kSum,    ReduceOp::kProduct, ReduceOp::kMin,
                             ReduceOp::kMax,    ReduceOp::kBitAnd,  ReduceOp::kBitOr,
                             ReduceOp::kBitXor, ReduceOp::kAvg};

/// Bytes in random pieces, each at a random place of a buffer of its own (so ASan sees every step
/// beyond it).
Payload inPieces(const std::vector<std::byte>& bytes, std::mt19937& random, std::size_t piece_max) {
  auto owner = std::make_shared<std::vector<std::vector<std::byte>>>();
  std::vector<Bytes> pieces;
  for (std::size_t at = 0; at < bytes.size();) {
    const std::size_t size = std::min(bytes.size() - at, std::size_t{1} + random() % piece_max);
    const std::size_t shift = random() % 8;
    std::vector<std::byte> buffer(shift + size);
    std::memcpy(buffer.data() + shift, bytes.data() + at, size);
    owner->push_back(std::move(buffer));
    pieces.emplace_back(owner->back().data() + shift, size);
    at += size;
  }
  return {std::move(pieces), owner};
}

bool roundedToLess(DataType dtype) {
  return dtype == DataType::kFloat16 || dtype == DataType::kBFloat16 ||
         dtype == DataType::kFloat8E4M3FN || dtype == DataType::kFloat8E5M2;
}

/// Values that are ordinary numbers of the type (any bits for integers and float8), plus a few
/// special ones for floats.
std::vector<std::byte> randomValues(DataType dtype, std::size_t count, std::mt19937& random,
                                    bool specials) {
  std::vector<std::byte> bytes(count * sizeOf(dtype));
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  std::normal_distribution<double> normal;
  const auto number = [&]() -> double {
    if (specials && random() % 16 == 0) {
      const double values[] = {0.0,     -0.0, INFINITY, -INFINITY, 1e-40,
                               65504.0, 3e38, -1e-7,    NAN,       -NAN};
      return values[random() % std::size(values)];
    }
    return normal(random) * std::pow(10.0, static_cast<int>(random() % 7) - 3);
  };
  const auto put = [&](std::size_t i, auto value) {
    std::memcpy(bytes.data() + i * sizeof(value), &value, sizeof(value));
  };
  for (std::size_t i = 0; i < count; ++i) {
    switch (dtype) {
      case DataType::kFloat32:
        put(i, static_cast<float>(number()));
        break;
      case DataType::kFloat64:
        put(i, number());
        break;
      case DataType::kFloat16:
        put(i, toFloat16(static_cast<float>(number())));
        break;
      case DataType::kBFloat16:
        put(i, toBFloat16(static_cast<float>(number())));
        break;
      case DataType::kComplex64:
        put(2 * i, static_cast<float>(number()));
        put(2 * i + 1, static_cast<float>(number()));
        break;
      case DataType::kComplex128:
        put(2 * i, number());
        put(2 * i + 1, number());
        break;
      default:
        break;
    }
  }
  return bytes;
}

template <class T>
Payload of(const std::vector<T>& values) {
  auto copy = std::make_shared<std::vector<T>>(values);
  return {Bytes(reinterpret_cast<const std::byte*>(copy->data()), copy->size() * sizeof(T)), copy};
}

template <class T>
std::vector<T> reduced(DataType dtype, ReduceOp op, const std::vector<Payload>& inputs,
                       std::size_t count) {
  std::vector<T> out(count);
  reduce(dtype, op, inputs, reinterpret_cast<std::byte*>(out.data()), count);
  return out;
}

class EveryInstructionSet : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override { ASSERT_TRUE(pinInstructionSet(GetParam())); }
  void TearDown() override { ASSERT_TRUE(pinInstructionSet("")); }
};

TEST_P(EveryInstructionSet, HasTheBitsOfTheScalarReference) {
  std::mt19937 random(1);
  int cases = 0;
  for (const DataType dtype : kTypes) {
    for (const ReduceOp op : kOps) {
      if (!supports(op, dtype)) continue;
      for (const std::size_t inputs : {1u, 2u, 3u, 8u}) {
        for (const std::size_t count : {0u, 1u, 3u, 17u, 64u, 1000u, 4099u}) {
          for (const std::size_t piece_max : {7u, 1500u, 1u << 20}) {
            if (piece_max == 7 && count > 1000) continue;
            std::vector<Payload> payloads;
            for (std::size_t r = 0; r < inputs; ++r) {
              payloads.push_back(
                  inPieces(randomValues(dtype, count, random, true), random, piece_max));
            }
            const std::size_t shift = random() % 4;
            std::vector<std::byte> got(shift + count * sizeOf(dtype));
            reduce(dtype, op, payloads, got.data() + shift, count);
            got.erase(got.begin(), got.begin() + static_cast<std::ptrdiff_t>(shift));
            std::vector<std::byte> expected(count * sizeOf(dtype));
            reduceScalar(dtype, op, payloads, expected.data(), count);
            ASSERT_EQ(got, expected)
                << nameOf(op) << " of " << inputs << " x " << count << " " << nameOf(dtype);
            ++cases;
          }
        }
      }
    }
  }
  EXPECT_GT(cases, 5000);
}

TEST_P(EveryInstructionSet, AccumulateAndDivideAreTheSameArithmetic) {
  std::mt19937 random(2);
  for (const DataType dtype : kTypes) {
    for (const ReduceOp op : kOps) {
      if (!supports(op, dtype)) continue;
      const std::size_t count = 1003;
      const std::vector<std::byte> a = randomValues(dtype, count, random, false);
      const std::vector<std::byte> b = randomValues(dtype, count, random, false);
      const std::vector<Payload> both{inPieces(a, random, 1 << 20), inPieces(b, random, 13)};
      std::vector<std::byte> expected(a.size());
      // Rounded once more by the ring's way.
      if (op == ReduceOp::kAvg && roundedToLess(dtype)) continue;
      reduceScalar(dtype, op, both, expected.data(), count);
      std::vector<std::byte> got = a;
      accumulate(dtype, op, got.data(), both[1], count);
      if (op == ReduceOp::kAvg) divide(dtype, got.data(), count, 2);
      ASSERT_EQ(got, expected) << nameOf(op) << " " << nameOf(dtype);
    }
  }
}

TEST_P(EveryInstructionSet, ReadsAndRoundsEveryFloat16) {
  std::vector<std::uint16_t> all(65536);
  std::iota(all.begin(), all.end(), std::uint16_t{0});
  const std::vector<Payload> alone{of(all)};
  const auto same = reduced<std::uint16_t>(DataType::kFloat16, ReduceOp::kSum, alone, all.size());
  for (std::size_t i = 0; i < all.size(); ++i) {
    const bool is_nan = (all[i] & 0x7FFF) > 0x7C00;
    ASSERT_EQ(same[i], is_nan ? 0x7E00 : all[i]);
  }
  // Sums and products with a few others: results of every size, ties and subnormals among them.
  for (const std::uint16_t other : {0x0001, 0x03FF, 0x1400, 0x3800, 0x3555, 0xB801, 0x7BFF}) {
    const std::vector<Payload> both{of(all), of(std::vector(all.size(), other))};
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kProduct, ReduceOp::kAvg}) {
      std::vector<std::uint16_t> expected(all.size());
      reduceScalar(DataType::kFloat16, op, both, reinterpret_cast<std::byte*>(expected.data()),
                   all.size());
      ASSERT_EQ(reduced<std::uint16_t>(DataType::kFloat16, op, both, all.size()), expected)
          << nameOf(op) << " with " << other;
    }
  }
}

TEST_P(EveryInstructionSet, CombinesEveryPairOfFloat8) {
  std::vector<std::uint8_t> left(65536);
  std::vector<std::uint8_t> right(65536);
  for (std::size_t i = 0; i < left.size(); ++i) {
    left[i] = static_cast<std::uint8_t>(i >> 8);
    right[i] = static_cast<std::uint8_t>(i);
  }
  for (const DataType dtype : kFloat8Types) {
    for (const ReduceOp op : kOps) {
      if (!supports(op, dtype)) continue;
      for (const auto& inputs : {std::vector<Payload>{of(left), of(right)},
                                 std::vector<Payload>{of(left), of(right), of(left)}}) {
        std::vector<std::uint8_t> expected(left.size());
        reduceScalar(dtype, op, inputs, reinterpret_cast<std::byte*>(expected.data()), left.size());
        ASSERT_EQ(reduced<std::uint8_t>(dtype, op, inputs, left.size()), expected)
            << nameOf(op) << " " << nameOf(dtype);
      }
    }
  }
}

TEST_P(EveryInstructionSet, ReadsAndRoundsFloat8AsTheScalarCodeDoes) {
  const auto check = [](DataType dtype, auto from, auto to) {
    std::vector<std::uint8_t> all(256);
    std::iota(all.begin(), all.end(), std::uint8_t{0});
    std::vector<float> wide(all.size());
    widenFloat8(dtype, all.data(), wide.data(), all.size());
    for (std::size_t i = 0; i < all.size(); ++i) {
      ASSERT_EQ(std::bit_cast<std::uint32_t>(wide[i]), std::bit_cast<std::uint32_t>(from(all[i])))
          << nameOf(dtype) << " " << i;
    }
    // Every 509th float, NaNs too: some of each exponent, and all low bits.
    std::vector<float> values((std::uint64_t{1} << 32) / 509 + 1);
    for (std::size_t i = 0; i < values.size(); ++i)
      values[i] = std::bit_cast<float>(static_cast<std::uint32_t>(509 * i));
    std::vector<std::uint8_t> rounded(values.size());
    narrowFloat8(dtype, values.data(), rounded.data(), values.size());
    for (std::size_t i = 0; i < values.size(); ++i)
      ASSERT_EQ(rounded[i], to(values[i])) << nameOf(dtype) << " of " << values[i];
  };
  check(DataType::kFloat8E4M3FN, fromFloat8<E4M3FN>, toFloat8<E4M3FN>);
  check(DataType::kFloat8E5M2, fromFloat8<E5M2>, toFloat8<E5M2>);
}

TEST_P(EveryInstructionSet, RoundsBFloat16ToNearestEven) {
  // 1 + 2^-8 lies between 1 and 1 + 2^-7 and goes to 1, whose last bit is 0; 1 + 2^-7 + 2^-8 goes
  // up.
  const std::vector<Payload> inputs{
      of<std::uint16_t>({0x3F80, 0x3F81, 0x3F80, 0x7F7F, 0x0001, 0xFF80}),
      of<std::uint16_t>({0x3B80, 0x3B80, 0x3B81, 0x7B00, 0x0001, 0x3F80})};
  EXPECT_EQ(reduced<std::uint16_t>(DataType::kBFloat16, ReduceOp::kSum, inputs, 6),
            (std::vector<std::uint16_t>{0x3F80, 0x3F82, 0x3F81, 0x7F80, 0x0002, 0xFF80}));
}

TEST_P(EveryInstructionSet, AllNansAreOne) {
  const auto check = [](DataType dtype, auto infinity, auto other_nan, auto nan) {
    using T = decltype(nan);
    const std::vector<T> expected(50, nan);
    const auto negative = static_cast<T>(infinity | T{1} << (8 * sizeof(T) - 1));
    const std::vector<Payload> invalid{of(std::vector<T>(50, infinity)),
                                       of(std::vector<T>(50, negative))};
    EXPECT_EQ(reduced<T>(dtype, ReduceOp::kSum, invalid, 50), expected) << nameOf(dtype);
    const std::vector<Payload> nans{of(std::vector<T>(50, other_nan)), of(std::vector<T>(50, nan))};
    for (const ReduceOp op : {ReduceOp::kSum, ReduceOp::kProduct, ReduceOp::kMin, ReduceOp::kMax}) {
      EXPECT_EQ(reduced<T>(dtype, op, nans, 50), expected) << nameOf(op) << " " << nameOf(dtype);
    }
  };
  check(DataType::kFloat32, 0x7F800000u, 0xFFC12345u, 0x7FC00000u);
  check(DataType::kFloat64, std::uint64_t{0x7FF} << 52, std::uint64_t{0xFFFF} << 48,
        std::uint64_t{0x7FF8} << 48);
  check(DataType::kFloat16, std::uint16_t{0x7C00}, std::uint16_t{0xFD01}, std::uint16_t{0x7E00});
  check(DataType::kBFloat16, std::uint16_t{0x7F80}, std::uint16_t{0xFF81}, std::uint16_t{0x7FC0});
  check(DataType::kFloat8E5M2, std::uint8_t{0x7C}, std::uint8_t{0xFD}, std::uint8_t{0x7F});
  // float8_e4m3fn has no infinity: a NaN comes only of a NaN.
  check(DataType::kFloat8E4M3FN, std::uint8_t{0x7F}, std::uint8_t{0xFF}, std::uint8_t{0x7F});
}

TEST_P(EveryInstructionSet, UnsignedIntegersAreUnsigned) {
  const auto check = [](DataType dtype, auto top) {
    using T = decltype(top);  // the highest bit alone
    const auto filled = [](T value) { return of(std::vector<T>(41, value)); };
    const auto result = [&](ReduceOp op, T a, T b) {
      const std::vector<T> out = reduced<T>(dtype, op, {filled(a), filled(b)}, 41);
      EXPECT_EQ(out, std::vector<T>(41, out[0]));
      return out[0];
    };
    const T highest = static_cast<T>(~T{0});
    EXPECT_EQ(result(ReduceOp::kMax, top, T{1}), top) << nameOf(dtype);
    EXPECT_EQ(result(ReduceOp::kMin, top, T{1}), T{1}) << nameOf(dtype);
    EXPECT_EQ(result(ReduceOp::kSum, highest, T{2}), T{1}) << nameOf(dtype);
    EXPECT_EQ(result(ReduceOp::kProduct, highest, highest), T{1}) << nameOf(dtype);
    EXPECT_EQ(result(ReduceOp::kAvg, highest, T{0}), highest / 2) << nameOf(dtype);
    EXPECT_EQ(result(ReduceOp::kBitXor, highest, top), static_cast<T>(top - 1)) << nameOf(dtype);
    std::vector<T> sum(41, highest);
    divide(dtype, reinterpret_cast<std::byte*>(sum.data()), sum.size(), 3);
    EXPECT_EQ(sum, std::vector<T>(41, highest / 3)) << nameOf(dtype);
  };
  check(DataType::kUInt8, static_cast<std::uint8_t>(1u << 7));
  check(DataType::kUInt16, static_cast<std::uint16_t>(1u << 15));
  check(DataType::kUInt32, std::uint32_t{1} << 31);
  check(DataType::kUInt64, std::uint64_t{1} << 63);
}

TEST_P(EveryInstructionSet, ProductsWrapAndComplexOnesAreComplex) {
  const auto filled = [](auto value) { return of(std::vector(37, value)); };
  const std::int8_t small =
      reduced<std::int8_t>(DataType::kInt8, ReduceOp::kProduct,
                           {filled(std::int8_t{-7}), filled(std::int8_t{100})}, 37)[36];
  EXPECT_EQ(small, 68);  // -700 + 3 * 256
  const std::vector<std::int64_t> large = reduced<std::int64_t>(
      DataType::kInt64, ReduceOp::kProduct,
      {filled(std::int64_t{-0x123456789}), filled(std::int64_t{0x987654321})}, 37);
  EXPECT_EQ(large, std::vector<std::int64_t>(37, 0x28828BD331E7CC57));  // modulo 2^64
  using C = std::complex<float>;
  for (const C value : reduced<C>(DataType::kComplex64, ReduceOp::kProduct,
                                  {filled(C(1, 2)), filled(C(3, -4))}, 37)) {
    EXPECT_EQ(value, C(11, 2));
  }
  using Z = std::complex<double>;
  for (const Z value : reduced<Z>(DataType::kComplex128, ReduceOp::kProduct,
                                  {filled(Z(0, 1)), filled(Z(0, 1)), filled(Z(2, 5))}, 37)) {
    EXPECT_EQ(value, Z(-2, -5));
  }
}

TEST_P(EveryInstructionSet, MinAndMaxKeepNansAndTheFirstOfEquals) {
  for (const ReduceOp op : {ReduceOp::kMin, ReduceOp::kMax}) {
    for (std::size_t where = 0; where < 3; ++where) {
      std::vector<Payload> inputs;
      for (std::size_t r = 0; r < 3; ++r)
        inputs.push_back(of<float>(std::vector<float>(40, r == where ? NAN : 1.0f)));
      for (const float value : reduced<float>(DataType::kFloat32, op, inputs, 40))
        EXPECT_TRUE(std::isnan(value));
    }
    const std::vector<Payload> zeros{of<float>(std::vector<float>(40, -0.0f)),
                                     of<float>(std::vector<float>(40, 0.0f))};
    for (const float value : reduced<float>(DataType::kFloat32, op, zeros, 40))
      EXPECT_TRUE(std::signbit(value));
  }
}

INSTANTIATE_TEST_SUITE_P(All, EveryInstructionSet, testing::ValuesIn(instructionSets()),
                         [](const auto& param) { return param.param; });

TEST(Half, BFloat16RoundsToNearestEven) {
  const std::pair<std::uint32_t, std::uint16_t> cases[] = {
      {0x3F800000, 0x3F80}, {0x3F808000, 0x3F80}, {0x3F818000, 0x3F82}, {0x3F808001, 0x3F81},
      {0x7F7FFFFF, 0x7F80}, {0x00000001, 0x0000}, {0x00018000, 0x0002}, {0x7F800000, 0x7F80},
      {0xFF800000, 0xFF80}, {0x80000000, 0x8000}};
  for (const auto& [bits, expected] : cases)
    EXPECT_EQ(toBFloat16(std::bit_cast<float>(bits)), expected) << bits;
  EXPECT_EQ(toBFloat16(std::bit_cast<float>(0x7F800001u)), 0x7FC0)
      << "a NaN must not become infinity";
}

TEST(Half, Float16RoundsToNearestEven) {
  const std::pair<float, std::uint16_t> cases[] = {
      {1.0f, 0x3C00},         {65504.0f, 0x7BFF},
      {65519.9f, 0x7BFF},     {65520.0f, 0x7C00},
      {1e9f, 0x7C00},         {0x1p-14f, 0x0400},
      {0x1p-24f, 0x0001},     {0x1p-25f, 0x0000},
      {0x1.8p-24f, 0x0002},   {0x1.000002p-25f, 0x0001},
      {2049.0f, 0x6800},      {2051.0f, 0x6802},
      {-0.0f, 0x8000},        {-INFINITY, 0xFC00},
      {0x1.FF8p-15f, 0x03FF}, {0x1.FFCp-15f, 0x0400}};
  for (const auto& [value, expected] : cases) EXPECT_EQ(toFloat16(value), expected) << value;
  EXPECT_GT(toFloat16(NAN) & 0x7FFF, 0x7C00);
}

TEST(Half, EveryFloat16SurvivesARoundTrip) {
  for (std::uint32_t half = 0; half < 65536; ++half) {
    const auto bits = static_cast<std::uint16_t>(half);
    if ((bits & 0x7FFF) > 0x7C00) {
      ASSERT_TRUE(std::isnan(fromFloat16(bits)));
    } else {
      ASSERT_EQ(toFloat16(fromFloat16(bits)), bits);
    }
    if ((bits & 0x7FFF) <= 0x7F80) {
      ASSERT_EQ(toBFloat16(fromBFloat16(bits)), bits);
    }
  }
}

/// Rounds by looking for the nearest of all values, in float64, where distances are exact.
template <class Format>
std::uint8_t nearestFloat8(float value) {
  if (std::isnan(value)) return 0x7F;
  const double magnitude = std::fabs(static_cast<double>(value));
  int best = 0;
  for (int bits = 1; bits <= Format::kLargestFinite; ++bits) {
    const auto distance = [&](int of) {
      return std::fabs(fromFloat8<Format>(static_cast<std::uint8_t>(of)) - magnitude);
    };
    if (distance(bits) < distance(best) || (distance(bits) == distance(best) && bits % 2 == 0)) {
      best = bits;
    }
  }
  // Half a step beyond the largest, where a format that goes on would have its next value.
  const double largest = fromFloat8<Format>(Format::kLargestFinite);
  const double step = largest - fromFloat8<Format>(Format::kLargestFinite - 1);
  const bool over = magnitude > largest + step / 2 ||
                    (magnitude == largest + step / 2 && Format::kLargestFinite % 2 == 1);
  if (over) best = Format::kOverflow;
  return static_cast<std::uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

template <class Format>
void checkFloat8Boundaries() {
  for (int bits = 0; bits <= Format::kLargestFinite; ++bits) {
    const float here = fromFloat8<Format>(static_cast<std::uint8_t>(bits));
    // Beyond the largest number lies one more step.
    const float next = bits < Format::kLargestFinite
                           ? fromFloat8<Format>(static_cast<std::uint8_t>(bits + 1))
                           : 2 * here - fromFloat8<Format>(static_cast<std::uint8_t>(bits - 1));
    for (const float middle : {here, here + (next - here) / 2, next}) {
      for (const float value :
           {middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY)}) {
        ASSERT_EQ(toFloat8<Format>(value), nearestFloat8<Format>(value)) << value;
        ASSERT_EQ(toFloat8<Format>(-value), nearestFloat8<Format>(-value)) << -value;
      }
    }
  }
}

TEST(Float8, RoundsToTheNearestAndOnTiesToEven) {
  checkFloat8Boundaries<E4M3FN>();
  checkFloat8Boundaries<E5M2>();
}

TEST(Float8, HasTheLimitsOfItsFormat) {
  EXPECT_EQ(fromFloat8<E4M3FN>(0x7E), 448.0f);
  EXPECT_EQ(fromFloat8<E4M3FN>(0x01), 0x1p-9f);
  EXPECT_TRUE(std::isnan(fromFloat8<E4M3FN>(0xFF)));
  EXPECT_EQ(fromFloat8<E5M2>(0x7B), 57344.0f);
  EXPECT_EQ(fromFloat8<E5M2>(0x01), 0x1p-16f);
  EXPECT_EQ(fromFloat8<E5M2>(0xFC), -INFINITY);
  // What is too large: the largest number where there is no infinity.
  for (const float large : {465.0f, 1e30f, INFINITY}) {
    EXPECT_EQ(toFloat8<E4M3FN>(large), 0x7E);
    EXPECT_EQ(toFloat8<E4M3FN>(-large), 0xFE);
  }
  EXPECT_EQ(toFloat8<E5M2>(61439.0f), 0x7B);
  EXPECT_EQ(toFloat8<E5M2>(61440.0f), 0x7C);
  EXPECT_EQ(toFloat8<E5M2>(-INFINITY), 0xFC);
  EXPECT_EQ(toFloat8<E4M3FN>(-NAN), 0x7F);
  EXPECT_EQ(toFloat8<E5M2>(-NAN), 0x7F);
  EXPECT_EQ(toFloat8<E4M3FN>(-0.0f), 0x80);
  for (int bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<std::uint8_t>(bits);
    const bool four_three_nan = (bits & 0x7F) == 0x7F;
    ASSERT_EQ(toFloat8<E4M3FN>(fromFloat8<E4M3FN>(byte)), four_three_nan ? 0x7F : byte);
    const bool five_two_nan = (bits & 0x7F) > 0x7C;
    ASSERT_EQ(toFloat8<E5M2>(fromFloat8<E5M2>(byte)), five_two_nan ? 0x7F : byte);
  }
}

TEST(Reduce, Float8IsAccumulatedInFloat32AndRoundedOnce) {
  // 32 + 1 + 1 + 2: the neighbour of 32 is 36, and rounded each time the sum would stay at 32.
  const auto alone = [](float value) { return of<std::uint8_t>({toFloat8<E4M3FN>(value)}); };
  EXPECT_EQ(reduced<std::uint8_t>(DataType::kFloat8E4M3FN, ReduceOp::kSum,
                                  {alone(32), alone(1), alone(1), alone(2)}, 1)[0],
            toFloat8<E4M3FN>(36));
  // A sum may leave the range of the type on its way, and a mean is made before it is rounded.
  EXPECT_EQ(reduced<std::uint8_t>(DataType::kFloat8E4M3FN, ReduceOp::kSum,
                                  {alone(448), alone(448), alone(-448)}, 1)[0],
            toFloat8<E4M3FN>(448));
  EXPECT_EQ(reduced<std::uint8_t>(DataType::kFloat8E4M3FN, ReduceOp::kAvg, {alone(448), alone(448)},
                                  1)[0],
            toFloat8<E4M3FN>(448));
}

TEST(DataTypes, HaveNamesAndSizesUpToTheLast) {
  for (int number = 1; number <= static_cast<int>(kLastDataType); ++number) {
    EXPECT_GT(sizeOf(static_cast<DataType>(number)), 0u) << number;
    EXPECT_NE(nameOf(static_cast<DataType>(number)), "?") << number;
  }
  EXPECT_EQ(sizeOf(static_cast<DataType>(static_cast<int>(kLastDataType) + 1)), 0u);
  EXPECT_TRUE(supports(ReduceOp::kBitXor, DataType::kUInt64));
  EXPECT_FALSE(supports(ReduceOp::kBitXor, DataType::kFloat8E5M2));
  EXPECT_TRUE(supports(ReduceOp::kMax, DataType::kFloat8E4M3FN));
}

TEST(Reduce, HalvesAreAccumulatedInFloat32AndRoundedOnce) {
  // 256 + 1 + 1: in bfloat16 each addition of 1 would be lost; in float32 the sum is 258.
  const std::vector<Payload> inputs{of<std::uint16_t>({toBFloat16(256)}),
                                    of<std::uint16_t>({toBFloat16(1)}),
                                    of<std::uint16_t>({toBFloat16(1)})};
  EXPECT_EQ(reduced<std::uint16_t>(DataType::kBFloat16, ReduceOp::kSum, inputs, 1)[0],
            toBFloat16(258));
}

TEST(Reduce, GoesFromLeftToRight) {
  const std::vector<Payload> inputs{of<float>({1e8f}), of<float>({1.0f}), of<float>({-1e8f}),
                                    of<float>({1.0f})};
  EXPECT_EQ(reduced<float>(DataType::kFloat32, ReduceOp::kSum, inputs, 1)[0],
            ((1e8f + 1.0f) - 1e8f) + 1.0f);
}

TEST(Reduce, IntegersWrapAndTheirMeanGoesTowardZero) {
  const std::vector<Payload> large{of<std::int32_t>({INT32_MAX}), of<std::int32_t>({1})};
  EXPECT_EQ(reduced<std::int32_t>(DataType::kInt32, ReduceOp::kSum, large, 1)[0], INT32_MIN);
  const std::vector<Payload> odd{of<std::int64_t>({-3}), of<std::int64_t>({0})};
  EXPECT_EQ(reduced<std::int64_t>(DataType::kInt64, ReduceOp::kAvg, odd, 1)[0], -1);
}

TEST(Reduce, BooleansAreNormalised) {
  const std::vector<Payload> inputs{of<std::uint8_t>({0, 2, 0, 255}),
                                    of<std::uint8_t>({0, 0, 7, 1})};
  EXPECT_EQ(reduced<std::uint8_t>(DataType::kBool, ReduceOp::kSum, inputs, 4),
            (std::vector<std::uint8_t>{0, 1, 1, 1}));
  EXPECT_EQ(reduced<std::uint8_t>(DataType::kBool, ReduceOp::kMin, inputs, 4),
            (std::vector<std::uint8_t>{0, 0, 0, 1}));
  EXPECT_EQ(reduced<std::uint8_t>(DataType::kBool, ReduceOp::kBitXor, inputs, 4),
            (std::vector<std::uint8_t>{0, 1, 1, 0}));
}

TEST(InstructionSets, AreNamedAndUnknownOnesAreRefused) {
  EXPECT_FALSE(instructionSets().empty());
  EXPECT_FALSE(pinInstructionSet("MMX"));
  const std::vector<std::string> all = instructionSets();
  ASSERT_TRUE(pinInstructionSet(all.back()));
  EXPECT_EQ(instructionSets(), all) << "a pin must not change what the machine can run";
  EXPECT_TRUE(pinInstructionSet(""));
}

}  // namespace
}  // namespace reducer::kernels
