// A call's tensors as the core wants them: contiguous host memory that stays where it is.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>

#include <memory>
#include <utility>
#include <vector>

#include "torch/accelerator.h"

namespace reducer::torch_backend {

/// The same memory under a tensor object of its own. An at::Tensor that Python knows cannot be
/// released without the GIL (its last C++ reference keeps the Python object alive), and the
/// transport's threads, which release ours, must never wait for the GIL. So operations hold
/// storages and aliases, and not the caller's tensors.
inline at::Tensor aliasOf(const at::Tensor& tensor) { return tensor.detach(); }

/// What inputs are multiplied by before they are summed; undefined: nothing.
using Factor = at::Tensor;

/// Holds the memory of one call's tensors, and staging copies of those that are not plain
/// contiguous memory of the host. Thread safety: filled by one thread; copyBack() once, from any
/// thread, after that.
class Buffers {
 public:
  /// Memory to read from: numel() elements.
  const void* in(const at::Tensor& tensor, const Factor& factor = {}) {
    if (!tensor.is_cpu()) return copiesFor(tensor).stage(staged(tensor, factor), true, false);
    if (plain(tensor) && !factor.defined()) return keep(tensor).const_data_ptr();
    return keep(staged(tensor, factor)).const_data_ptr();
  }

  /// Memory to write to; what was in it does not matter.
  void* out(const at::Tensor& tensor) {
    at::assert_no_internal_overlap(tensor);
    const bool is_plain = plain(tensor);
    const at::Tensor target =
        is_plain ? tensor
                 : at::empty(tensor.sizes(),
                             tensor.options().memory_format(at::MemoryFormat::Contiguous));
    if (!is_plain) back_.emplace_back(aliasOf(tensor), target);
    if (!tensor.is_cpu()) return copiesFor(tensor).stage(target, false, true);
    return keep(target).mutable_data_ptr();
  }

  /// Memory to read from and to write to.
  void* inout(const at::Tensor& tensor, const Factor& factor = {}) {
    at::assert_no_internal_overlap(tensor);
    const bool is_plain = plain(tensor) && !factor.defined();
    const at::Tensor target = is_plain ? tensor : staged(tensor, factor);
    if (!is_plain) back_.emplace_back(aliasOf(tensor), target);
    if (!tensor.is_cpu()) return copiesFor(tensor).stage(target, true, true);
    return keep(target).mutable_data_ptr();
  }

  /// True if copyBack() has to move bytes.
  bool hasBack() const { return !back_.empty(); }

  /// Brings results from the staging copies to where the caller wants them.
  void copyBack() {
    if (back_.empty()) return;
    const auto copy = [this] {
      // Below autograd, as every collective that writes into tensors of the caller; and into
      // inference tensors too.
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      for (const auto& [tensor, staging] : back_) tensor.copy_(staging, /*non_blocking=*/true);
    };
    if (copies_) {
      copies_->onUpStream(copy);
    } else {
      copy();
      back_.clear();
    }
  }

  /// True if some memory is not torch's own: letting go of it may run any code, and numpy's wants
  /// the GIL.
  bool borrowed() const { return borrowed_; }

  /// The copies from and to an accelerator; null for tensors of the host.
  DeviceCopies* copies() const { return copies_.get(); }

 private:
  static bool plain(const at::Tensor& tensor) {
    return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
  }
  static at::Tensor staged(const at::Tensor& tensor, const Factor& factor) {
    const at::Tensor source = tensor.detach().resolve_conj().resolve_neg().contiguous();
    if (!factor.defined()) return source;
    // torch does not multiply float8 on the CPU.
    const bool narrow = c10::isFloat8Type(tensor.scalar_type());
    return at::mul(narrow ? source.to(at::kFloat) : source, factor).to(tensor.scalar_type());
  }
  const at::Tensor& keep(const at::Tensor& tensor) {
    storages_.push_back(tensor.storage());
    const c10::DataPtr& data = tensor.storage().data_ptr();
    if (data.get() != nullptr && data.get_deleter() != c10::GetCPUAllocator()->raw_deleter()) {
      borrowed_ = true;
    }
    return tensor;
  }
  DeviceCopies& copiesFor(const at::Tensor& tensor) {
    if (!copies_) copies_ = std::make_unique<DeviceCopies>(tensor.device());
    return *copies_;
  }

  std::vector<c10::Storage> storages_;
  std::vector<std::pair<at::Tensor, at::Tensor>>
      back_;  // the caller's (an alias), the staging copy
  std::unique_ptr<DeviceCopies> copies_;
  bool borrowed_ = false;
};

}  // namespace reducer::torch_backend
