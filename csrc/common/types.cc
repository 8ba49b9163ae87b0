#include "common/types.h"

namespace reducer {

std::size_t sizeOf(DataType dtype) noexcept {
  switch (dtype) {
    case DataType::kInt8:
    case DataType::kUInt8:
    case DataType::kBool:
    case DataType::kFloat8E4M3FN:
    case DataType::kFloat8E5M2:
      return 1;
    case DataType::kFloat16:
    case DataType::kBFloat16:
    case DataType::kInt16:
    case DataType::kUInt16:
      return 2;
    case DataType::kFloat32:
    case DataType::kInt32:
    case DataType::kUInt32:
      return 4;
    case DataType::kFloat64:
    case DataType::kInt64:
    case DataType::kUInt64:
    case DataType::kComplex64:
      return 8;
    case DataType::kComplex128:
      return 16;
  }
  return 0;
}

std::string_view nameOf(DataType dtype) noexcept {
  switch (dtype) {
    case DataType::kFloat32:
      return "float32";
    case DataType::kFloat64:
      return "float64";
    case DataType::kFloat16:
      return "float16";
    case DataType::kBFloat16:
      return "bfloat16";
    case DataType::kInt8:
      return "int8";
    case DataType::kInt16:
      return "int16";
    case DataType::kInt32:
      return "int32";
    case DataType::kInt64:
      return "int64";
    case DataType::kUInt8:
      return "uint8";
    case DataType::kBool:
      return "bool";
    case DataType::kComplex64:
      return "complex64";
    case DataType::kComplex128:
      return "complex128";
    case DataType::kFloat8E4M3FN:
      return "float8_e4m3fn";
    case DataType::kFloat8E5M2:
      return "float8_e5m2";
    case DataType::kUInt16:
      return "uint16";
    case DataType::kUInt32:
      return "uint32";
    case DataType::kUInt64:
      return "uint64";
  }
  return "?";
}

std::string_view nameOf(ReduceOp op) noexcept {
  switch (op) {
    case ReduceOp::kNone:
      return "none";
    case ReduceOp::kSum:
      return "sum";
    case ReduceOp::kProduct:
      return "product";
    case ReduceOp::kMin:
      return "min";
    case ReduceOp::kMax:
      return "max";
    case ReduceOp::kBitAnd:
      return "band";
    case ReduceOp::kBitOr:
      return "bor";
    case ReduceOp::kBitXor:
      return "bxor";
    case ReduceOp::kAvg:
      return "avg";
  }
  return "?";
}

std::string_view nameOf(Collective collective) noexcept {
  switch (collective) {
    case Collective::kAllReduce:
      return "all_reduce";
    case Collective::kReduce:
      return "reduce";
    case Collective::kBroadcast:
      return "broadcast";
    case Collective::kBarrier:
      return "barrier";
    case Collective::kAllGather:
      return "all_gather";
    case Collective::kReduceScatter:
      return "reduce_scatter";
    case Collective::kGather:
      return "gather";
    case Collective::kScatter:
      return "scatter";
    case Collective::kAllToAll:
      return "all_to_all";
    case Collective::kSendRecv:
      return "send/recv";
    case Collective::kSparseAllReduce:
      return "all_reduce of sparse tensors";
  }
  return "?";
}

bool supports(ReduceOp op, DataType dtype) noexcept {
  if (sizeOf(dtype) == 0 || nameOf(op) == "?") return false;
  const bool complex = dtype == DataType::kComplex64 || dtype == DataType::kComplex128;
  const bool floating = dtype == DataType::kFloat32 || dtype == DataType::kFloat64 ||
                        dtype == DataType::kFloat16 || dtype == DataType::kBFloat16 ||
                        dtype == DataType::kFloat8E4M3FN || dtype == DataType::kFloat8E5M2;
  switch (op) {
    case ReduceOp::kMin:
    case ReduceOp::kMax:
      return !complex;
    case ReduceOp::kBitAnd:
    case ReduceOp::kBitOr:
    case ReduceOp::kBitXor:
      return !complex && !floating;
    default:
      return true;
  }
}

ReduceOp partially(ReduceOp op, DataType dtype) noexcept {
  if (op != ReduceOp::kAvg) return op;
  return dtype == DataType::kBool ? ReduceOp::kBitAnd : ReduceOp::kSum;
}

}  // namespace reducer
