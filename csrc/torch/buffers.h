// An operation's tensors as the core wants them: contiguous memory that stays where it is.
#pragma once

#include <ATen/ATen.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/InferenceMode.h>

#include <utility>
#include <vector>

namespace reducer::torch_backend {

/// The same memory under a tensor object of its own. An at::Tensor that Python knows cannot be
/// released without the GIL (its last C++ reference keeps the Python object alive), and the
/// transport's threads, which release ours, must never wait for the GIL. So operations hold
/// storages and aliases, and not the caller's tensors.
inline at::Tensor aliasOf(const at::Tensor& tensor) { return tensor.detach(); }

/// Holds the memory of one operation's tensors, and staging copies of those that are not plain
/// contiguous memory. Thread safety: filled by one thread; copyBack() once, from any thread, after
/// that.
class Buffers {
 public:
  /// Memory to read from: numel() elements.
  const void* in(const at::Tensor& tensor) {
    if (plain(tensor)) return keep(tensor).const_data_ptr();
    return keep(staged(tensor)).const_data_ptr();
  }

  /// Memory to write to; what was in it does not matter.
  void* out(const at::Tensor& tensor) {
    at::assert_no_internal_overlap(tensor);
    if (plain(tensor)) return keep(tensor).mutable_data_ptr();
    return keepBack(
        tensor,
        at::empty(tensor.sizes(), tensor.options().memory_format(at::MemoryFormat::Contiguous)));
  }

  /// Memory to read from and to write to.
  void* inout(const at::Tensor& tensor) {
    at::assert_no_internal_overlap(tensor);
    if (plain(tensor)) return keep(tensor).mutable_data_ptr();
    return keepBack(tensor, staged(tensor));
  }

  /// Brings results from the staging copies to where the caller wants them.
  void copyBack() {
    if (back_.empty()) return;
    // Below autograd, as every collective that writes into tensors of the caller; and into
    // inference tensors too.
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (const auto& [tensor, copy] : back_) tensor.copy_(copy);
    back_.clear();
  }

 private:
  static bool plain(const at::Tensor& tensor) {
    return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
  }
  static at::Tensor staged(const at::Tensor& tensor) {
    return tensor.detach().resolve_conj().resolve_neg().contiguous();
  }
  const at::Tensor& keep(const at::Tensor& tensor) {
    storages_.push_back(tensor.storage());
    return tensor;
  }
  void* keepBack(const at::Tensor& tensor, at::Tensor copy) {
    void* data = keep(copy).mutable_data_ptr();
    back_.emplace_back(aliasOf(tensor), std::move(copy));
    return data;
  }

  std::vector<c10::Storage> storages_;
  std::vector<std::pair<at::Tensor, at::Tensor>>
      back_;  // the caller's (an alias), the staging copy
};

}  // namespace reducer::torch_backend
