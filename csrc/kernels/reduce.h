// Element-wise arithmetic on memory: the only place where numbers are added.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "common/payload.h"
#include "common/types.h"

namespace reducer::kernels {

/// out[i] = inputs[0][i] op inputs[1][i] op ... op inputs[n-1][i], strictly from left to right.
///
/// This is the library's one definition of a sum. Accumulators: float32 for float32, bfloat16,
/// float16 and the float8 types (rounded once, to nearest even, at the end); float64 for float64;
/// complex64 in float32 and complex128 in float64 parts; integers exact modulo 2^bits. No fused
/// multiply-add, and a NaN in a result is always the same positive quiet one (in both float8 types
/// 0x7F), so the bits are equal on every instruction set. What is too large for float8_e5m2 is
/// infinity; float8_e4m3fn, which has none, has its largest number there, 448 with the sign, as
/// PyTorch's conversion. kAvg divides the accumulator once by inputs.size() before the final
/// rounding (integers: toward zero). bool: any non-zero byte is true, results are 0 or 1; sum, max
/// and bor are "or", product, min and band are "and", bxor is "exclusive or", avg is "and" (the
/// truncated mean). min and max: a NaN in any input gives NaN; of equal values (+0, -0) the first
/// input's is kept.
///
/// `inputs`: at least one; each of exactly count * sizeOf(dtype) bytes, in pieces of any size and
/// alignment. `out`: count * sizeOf(dtype) bytes, any alignment, overlapping no input.
/// Reads each input once and writes `out` once. supports(op, dtype) must hold; kNone is not
/// allowed. Thread safe; allocates nothing that outlives the call.
void reduce(DataType dtype, ReduceOp op, std::span<const Payload> inputs, std::byte* out,
            std::size_t count);

/// The same for inputs in one piece each. `out` may be one of them, else overlaps nothing.
void reduce(DataType dtype, ReduceOp op, std::span<const std::byte* const> inputs, std::byte* out,
            std::size_t count);

/// The same by a plain scalar loop, one element at a time: the reference in tests.
void reduceScalar(DataType dtype, ReduceOp op, std::span<const Payload> inputs, std::byte* out,
                  std::size_t count);

/// out[i] = out[i] op in[i], rounded to dtype at each call: the ring's step. kAvg acts as kSum
/// here.
void accumulate(DataType dtype, ReduceOp op, std::byte* out, const Payload& in, std::size_t count);

/// out[i] = out[i] / divisor (integers toward zero): the ring's last step for kAvg.
void divide(DataType dtype, std::byte* out, std::size_t count, std::int64_t divisor);

/// The conversions that reduce() makes of a float8 type, to float32 and, rounding, from it.
void widenFloat8(DataType dtype, const std::uint8_t* in, float* out, std::size_t count);
void narrowFloat8(DataType dtype, const float* in, std::uint8_t* out, std::size_t count);

/// Instruction sets that this machine can run, best first, by Highway's names ("AVX3", "AVX2",
/// "SSE4" ...). Thread safe.
std::vector<std::string> instructionSets();

/// Pins one of instructionSets() for the whole process (tests, benchmarks); "" returns to the best.
/// False, and nothing changes, if unknown. Must not run while another thread is in this header's
/// functions.
bool pinInstructionSet(const std::string& name);

}  // namespace reducer::kernels
