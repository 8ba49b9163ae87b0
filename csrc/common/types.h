// The vocabulary that every layer shares: element types, operations, collectives.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace reducer {

/// Position of a worker in its group, 0 <= rank < world size. Reducers have no rank.
using Rank = std::int32_t;

/// Stands for "every rank of the group" where a rank is asked for.
inline constexpr Rank kAllRanks = -1;

/// Stands for "on every host the rank that carries share `share`" (Placement::carrier) where a rank
/// is asked for: the ranks of a rail.
constexpr Rank rail(Rank share) { return -2 - share; }
constexpr bool isRail(Rank rank) { return rank < kAllRanks; }
constexpr Rank shareOf(Rank rail) { return -2 - rail; }

/// Element types. The numbers are on the wire: append, never renumber.
enum class DataType : std::uint8_t {
  kFloat32 = 1,
  kFloat64 = 2,
  kFloat16 = 3,
  kBFloat16 = 4,
  kInt8 = 5,
  kInt16 = 6,
  kInt32 = 7,
  kInt64 = 8,
  kUInt8 = 9,
  kBool = 10,
  kComplex64 = 11,
  kComplex128 = 12,
  kFloat8E4M3FN = 13,  ///< 4 bits of exponent, 3 of fraction, no infinity, up to 448
  kFloat8E5M2 = 14,    ///< the upper half of a float16
  kUInt16 = 15,
  kUInt32 = 16,
  kUInt64 = 17,
};

/// The highest number of a DataType; there are no gaps below.
inline constexpr DataType kLastDataType = DataType::kUInt64;

/// What an owner does with what the ranks push. The numbers are on the wire.
enum class ReduceOp : std::uint8_t {
  kNone = 0,  ///< nothing is combined: the bytes of the only pusher are handed on
  kSum = 1,
  kProduct = 2,
  kMin = 3,
  kMax = 4,
  kBitAnd = 5,
  kBitOr = 6,
  kBitXor = 7,
  kAvg = 8,  ///< sum, divided once at the end by the number of pushers
};

/// The call that a rank made. The numbers are on the wire.
enum class Collective : std::uint8_t {
  kAllReduce = 1,
  kReduce = 2,
  kBroadcast = 3,
  kBarrier = 4,
  kAllGather = 5,
  kReduceScatter = 6,
  kGather = 7,
  kScatter = 8,
  kAllToAll = 9,
  kSendRecv = 10,
  kSparseAllReduce = 11,
};
inline constexpr Collective kLastCollective = Collective::kSparseAllReduce;

/// Bytes of one element; 0 for a number that is no DataType (as a peer may send).
std::size_t sizeOf(DataType dtype) noexcept;

/// Names as PyTorch users know them: "float32", "sum", "all_reduce". "?" for an unknown number.
std::string_view nameOf(DataType dtype) noexcept;
std::string_view nameOf(ReduceOp op) noexcept;
std::string_view nameOf(Collective collective) noexcept;

/// True if `op` has a meaning on `dtype`: bitwise operations want integers or bool; min and max
/// have none on complex numbers. kNone goes with every type.
bool supports(ReduceOp op, DataType dtype) noexcept;

/// What is done with a part of the inputs, where kAvg divides once at the end: a sum (of bool: the
/// mean is "and", which needs no division).
ReduceOp partially(ReduceOp op, DataType dtype) noexcept;

}  // namespace reducer
