// What a caller may pass: every check of an argument, with an error that names the rank, the call
// and the argument.
#pragma once

#include <ATen/ATen.h>
#include <ATen/DeviceAccelerator.h>
#include <c10/util/Exception.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <vector>

#include "common/types.h"

namespace reducer::torch_backend {

inline std::optional<DataType> dataTypeOf(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return DataType::kFloat32;
    case at::kDouble:
      return DataType::kFloat64;
    case at::kHalf:
      return DataType::kFloat16;
    case at::kBFloat16:
      return DataType::kBFloat16;
    case at::kChar:
      return DataType::kInt8;
    case at::kShort:
      return DataType::kInt16;
    case at::kInt:
      return DataType::kInt32;
    case at::kLong:
      return DataType::kInt64;
    case at::kByte:
      return DataType::kUInt8;
    case at::kBool:
      return DataType::kBool;
    case at::kFloat8_e4m3fn:
      return DataType::kFloat8E4M3FN;
    case at::kFloat8_e5m2:
      return DataType::kFloat8E5M2;
    case at::kUInt16:
      return DataType::kUInt16;
    case at::kUInt32:
      return DataType::kUInt32;
    case at::kUInt64:
      return DataType::kUInt64;
    case at::kComplexFloat:
      return DataType::kComplex64;
    case at::kComplexDouble:
      return DataType::kComplex128;
    default:
      return std::nullopt;
  }
}

/// What carries the bytes of a dtype that nothing is computed in (complex32, float4, ...), by its
/// size.
inline std::optional<DataType> carrierOf(std::size_t element_size) {
  switch (element_size) {
    case 1:
      return DataType::kUInt8;
    case 2:
      return DataType::kInt16;
    case 4:
      return DataType::kInt32;
    case 8:
      return DataType::kInt64;
    case 16:
      return DataType::kComplex128;
    default:
      return std::nullopt;
  }
}

/// The checks of one call. Raises ValueError, TypeError or NotImplementedError in Python.
class Arguments {
 public:
  /// `who` is "[rank R, group NAME]"; `call` as the user knows it: "all_reduce".
  Arguments(std::string_view who, std::string_view call, int rank, int size)
      : prefix_(std::string(who) + " " + std::string(call) + ": "), rank_(rank), size_(size) {}

  const std::string& prefix() const { return prefix_; }

  /// A dense tensor, of the host or of an accelerator. What has no DataType travels as bytes.
  DataType tensor(const char* name, const at::Tensor& tensor) const {
    TORCH_CHECK_VALUE(tensor.defined(), prefix_, name, " is no tensor");
    TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, prefix_, name, " is a ", tensor.layout(),
                     " tensor; only dense (strided) tensors are supported here, use to_dense()");
    TORCH_CHECK_TYPE(!tensor.is_quantized(), prefix_, name, " is quantized (", tensor.scalar_type(),
                     "); send int_repr(), scale and zero point instead");
    TORCH_CHECK_TYPE(tensor.is_cpu() || at::accelerator::isAccelerator(tensor.device().type()),
                     prefix_, name, " is on the device ", tensor.device(),
                     "; CPU and accelerator tensors are supported, use tensor.cpu()");
    const std::optional<DataType> dtype = dataTypeOf(tensor.scalar_type());
    if (dtype) return *dtype;
    const std::optional<DataType> carrier = carrierOf(tensor.element_size());
    TORCH_CHECK_TYPE(carrier.has_value(), prefix_, name, " has the dtype ", tensor.scalar_type(),
                     ", which is not supported");
    return *carrier;
  }

  /// All tensors of a call are in the memory of one device.
  void oneDevice(const std::vector<at::Tensor>& inputs,
                 const std::vector<at::Tensor>& outputs) const {
    const at::Tensor* first = nullptr;
    for (const auto* tensors : {&inputs, &outputs}) {
      for (const at::Tensor& tensor : *tensors) {
        if (first == nullptr) first = &tensor;
        TORCH_CHECK_VALUE(tensor.device() == first->device(), prefix_,
                          "the tensors are on different devices: ", first->device(), " and ",
                          tensor.device());
      }
    }
  }

  /// The only tensor of a list that torch makes of one.
  const at::Tensor& single(const char* name, const std::vector<at::Tensor>& tensors) const {
    TORCH_CHECK_VALUE(tensors.size() == 1, prefix_, name, " is a list of ", tensors.size(),
                      " tensors, exactly one is needed");
    return tensors[0];
  }

  /// One tensor for each rank, of this dtype each.
  void perRank(const char* name, const std::vector<at::Tensor>& tensors, DataType dtype) const {
    TORCH_CHECK_VALUE(tensors.size() == static_cast<std::size_t>(size_), prefix_, name, " has ",
                      tensors.size(), " tensors, one for each of the ", size_, " ranks is needed");
    for (std::size_t r = 0; r < tensors.size(); ++r) {
      const std::string item = std::string(name) + "[" + std::to_string(r) + "]";
      sameType(item.c_str(), tensor(item.c_str(), tensors[r]), dtype);
    }
  }

  void sameType(const char* name, DataType dtype, DataType wanted) const {
    TORCH_CHECK_TYPE(dtype == wanted, prefix_, name, " has the dtype ", nameOf(dtype),
                     ", the other tensors have ", nameOf(wanted));
  }

  void sameLength(const char* name, std::size_t length, const char* other,
                  std::size_t wanted) const {
    TORCH_CHECK_VALUE(length == wanted, prefix_, name, " has ", length, " tensors, ", other,
                      " has ", wanted);
  }

  void numel(const std::string& name, const at::Tensor& tensor, std::int64_t wanted,
             const char* why) const {
    TORCH_CHECK_VALUE(tensor.numel() == wanted, prefix_, name, " has ", tensor.numel(),
                      " elements, ", wanted, " are needed (", why, ")");
  }

  /// What a rank sends itself, nobody else compares.
  void equalToItself(std::size_t sent, std::size_t expected) const {
    TORCH_CHECK_VALUE(sent == expected, prefix_, "this rank sends itself ", sent,
                      " elements and expects ", expected, " from itself");
  }

  /// The list is for the root only.
  void emptyHere(const char* name, std::size_t length, Rank root) const {
    TORCH_CHECK_VALUE(length == 0, prefix_, name,
                      " must be empty on every rank but the root, which is rank ", root);
  }

  Rank rank(const char* name, std::int64_t rank) const {
    TORCH_CHECK_VALUE(rank >= 0 && rank < size_, prefix_, name, " is ", rank,
                      ", the ranks of this group are 0 to ", size_ - 1);
    return static_cast<Rank>(rank);
  }

  Rank peer(const char* name, std::int64_t peer) const {
    const Rank checked = rank(name, peer);
    TORCH_CHECK_VALUE(checked != rank_, prefix_, name, " is this rank itself");
    return checked;
  }

  Rank root(std::int64_t root_rank, std::int64_t root_tensor = 0) const {
    TORCH_CHECK_VALUE(root_tensor == 0, prefix_, "root tensor is ", root_tensor,
                      ", there is only tensor 0");
    return rank("root", root_rank);
  }

  std::uint32_t tag(std::int64_t tag) const {
    TORCH_CHECK_VALUE(tag >= 0 && tag <= std::numeric_limits<std::int32_t>::max(), prefix_,
                      "tag is ", tag, ", it must not be negative");
    return static_cast<std::uint32_t>(tag);
  }

  ReduceOp op(const c10d::ReduceOp& op, const at::Tensor& tensor) const {
    const ReduceOp known = knownOp(op);
    const std::optional<DataType> dtype = dataTypeOf(tensor.scalar_type());
    TORCH_CHECK_TYPE(dtype.has_value(), prefix_, "nothing can be computed in the dtype ",
                     tensor.scalar_type(), "; it can only be moved");
    TORCH_CHECK_TYPE(supports(known, *dtype), prefix_, "the operation '", nameOf(known),
                     "' has no meaning on the dtype ", nameOf(*dtype));
    return known;
  }

  /// PREMUL_SUM's factor for this tensor, of no dimension; undefined for other operations.
  at::Tensor factor(const c10d::ReduceOp& op, const at::Tensor& tensor) const {
    if (op.op_ != c10d::ReduceOp::PREMUL_SUM) return {};
    const auto* premul = dynamic_cast<const c10d::PreMulSumSupplement*>(op.supplement_.get());
    TORCH_CHECK_VALUE(premul != nullptr, prefix_, "PREMUL_SUM came without its factor");
    TORCH_CHECK_TYPE(tensor.is_floating_point() || tensor.is_complex(), prefix_,
                     "PREMUL_SUM wants floating-point or complex tensors, not ",
                     tensor.scalar_type());
    const at::NoGradGuard no_grad;
    if (premul->tensor_factor.defined()) {
      return premul->tensor_factor.detach().reshape({}).to(tensor.device());
    }
    return at::scalar_tensor(premul->double_factor, at::kDouble);
  }

 private:
  ReduceOp knownOp(const c10d::ReduceOp& op) const {
    switch (op.op_) {
      case c10d::ReduceOp::SUM:
      case c10d::ReduceOp::PREMUL_SUM:  // the factor is the caller's side of it
        return ReduceOp::kSum;
      case c10d::ReduceOp::AVG:
        return ReduceOp::kAvg;
      case c10d::ReduceOp::PRODUCT:
        return ReduceOp::kProduct;
      case c10d::ReduceOp::MIN:
        return ReduceOp::kMin;
      case c10d::ReduceOp::MAX:
        return ReduceOp::kMax;
      case c10d::ReduceOp::BAND:
        return ReduceOp::kBitAnd;
      case c10d::ReduceOp::BOR:
        return ReduceOp::kBitOr;
      case c10d::ReduceOp::BXOR:
        return ReduceOp::kBitXor;
      default:
        break;
    }
    TORCH_CHECK_VALUE(false, prefix_,
                      "this operation is not supported; there are SUM, AVG, "
                      "PRODUCT, MIN, MAX, BAND, BOR, BXOR and PREMUL_SUM");
  }

  const std::string prefix_;
  const int rank_;
  const int size_;
};

}  // namespace reducer::torch_backend
