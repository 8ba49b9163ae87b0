// The vector loops, one set for each instruction set, chosen at run time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/types.h"

namespace reducer::kernels {

/// dst[i] = srcs[0][i] op srcs[1][i] op ..., from left to right, over contiguous memory of any
/// alignment. dst may be one of srcs, else overlaps nothing. kAvg on integers gives the sum only
/// (divide() does the rest).
void reduceContiguous(DataType dtype, ReduceOp op, std::uint8_t* dst,
                      const std::uint8_t* const* srcs, std::size_t sources, std::size_t count);

/// dst[i] = dst[i] / divisor for floating and complex types.
void divideFloating(DataType dtype, std::uint8_t* dst, std::size_t count, std::size_t divisor);

}  // namespace reducer::kernels
