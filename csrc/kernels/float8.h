// float8 as bits, one element at a time, converted as PyTorch does. Rounding is to nearest, ties to
// even; every NaN becomes 0x7F.
#pragma once

#include <bit>
#include <cstdint>

namespace reducer::kernels {

/// 1 sign, 4 exponent and 3 fraction bits. No infinity, and one NaN for each sign; what is too
/// large, infinity too, becomes the largest number.
struct E4M3FN {
  static constexpr int kFractionBits = 3;
  static constexpr int kBias = 7;
  static constexpr int kLargestFinite = 0x7E;  // 448
  static constexpr int kOverflow = 0x7E;
};

/// 1 sign, 5 exponent and 2 fraction bits, with infinities, as float16 has them.
struct E5M2 {
  static constexpr int kFractionBits = 2;
  static constexpr int kBias = 15;
  static constexpr int kLargestFinite = 0x7B;  // 57344
  static constexpr int kOverflow = 0x7C;
};

inline constexpr int kFloat8Nan = 0x7F;

/// What both the scalar and the vector code derive from a format.
template <class Format>
struct Float8Bits {
  /// From the lowest place of a float32's fraction to that of a float8's.
  static constexpr int kShift = 23 - Format::kFractionBits;
  /// What the exponents of the two differ by.
  static constexpr int kRebias = 127 - Format::kBias;
  /// The bits of 2^exponent as a float32.
  static constexpr std::uint32_t powerOfTwo(int exponent) {
    return static_cast<std::uint32_t>(127 + exponent) << 23;
  }
  static constexpr int kSmallestExponent = 1 - Format::kBias;  // of numbers that are not subnormal
  static constexpr std::uint32_t kSmallestNormal = powerOfTwo(kSmallestExponent);
  /// The distance of subnormals.
  static constexpr float kUnit =
      std::bit_cast<float>(powerOfTwo(kSmallestExponent - Format::kFractionBits));
  /// A float32 whose last place is kUnit: adding it rounds what is smaller to a multiple of that.
  static constexpr std::uint32_t kRounder =
      powerOfTwo(kSmallestExponent - Format::kFractionBits + 23);
};

template <class Format>
inline float fromFloat8(std::uint8_t byte) {
  using Bits = Float8Bits<Format>;
  const std::uint32_t sign = static_cast<std::uint32_t>(byte & 0x80u) << 24;
  const std::uint32_t magnitude = byte & 0x7Fu;
  std::uint32_t wide;
  if (magnitude > Format::kLargestFinite) {
    wide = magnitude << Bits::kShift | 0x7F800000u;
  } else if (magnitude >> Format::kFractionBits != 0) {
    wide = (magnitude << Bits::kShift) + (static_cast<std::uint32_t>(Bits::kRebias) << 23);
  } else {
    wide = std::bit_cast<std::uint32_t>(static_cast<float>(magnitude) * Bits::kUnit);
  }
  return std::bit_cast<float>(sign | wide);
}

template <class Format>
inline std::uint8_t toFloat8(float value) {
  using Bits = Float8Bits<Format>;
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t sign = bits >> 24 & 0x80u;
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return kFloat8Nan;
  if (magnitude < Bits::kSmallestNormal) {
    const float sum = std::bit_cast<float>(magnitude) + std::bit_cast<float>(Bits::kRounder);
    return static_cast<std::uint8_t>(sign | (std::bit_cast<std::uint32_t>(sum) - Bits::kRounder));
  }
  const std::uint32_t odd = magnitude >> Bits::kShift & 1u;
  const std::uint32_t rounded =
      ((magnitude + ((1u << (Bits::kShift - 1)) - 1) + odd) >> Bits::kShift) -
      (static_cast<std::uint32_t>(Bits::kRebias) << Format::kFractionBits);
  const std::uint32_t limit = Format::kOverflow;
  return static_cast<std::uint8_t>(sign | (rounded < limit ? rounded : limit));
}

}  // namespace reducer::kernels
