// How one tensor's memory is divided among ranks.
#pragma once

#include <ATen/ATen.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <type_traits>
#include <vector>

#include "common/types.h"
#include "torch/arguments.h"

namespace reducer::torch_backend {

inline std::size_t elements(const at::Tensor& tensor) {
  return static_cast<std::size_t>(tensor.numel());
}

/// Memory of one tensor as equal parts, one for each rank.
template <class Pointer>
void cut(Pointer base, std::size_t count, DataType dtype, int n, std::vector<Pointer>& pointers,
         std::vector<std::size_t>& counts) {
  using Byte =
      std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
  for (int r = 0; r < n; ++r) {
    pointers.push_back(static_cast<Byte*>(base) +
                       static_cast<std::size_t>(r) * count * sizeOf(dtype));
    counts.push_back(count);
  }
}

/// Memory of one tensor as parts along its first dimension: equal ones if `splits` is empty.
template <class Pointer>
void cutRows(const Arguments& check, const std::string& name, const at::Tensor& tensor,
             const std::vector<std::int64_t>& splits, Pointer base, int n,
             std::vector<Pointer>& pointers, std::vector<std::size_t>& counts) {
  TORCH_CHECK_VALUE(tensor.dim() > 0, check.prefix(), name, " has no dimension to be split along");
  const std::int64_t rows = tensor.size(0);
  const std::int64_t row = rows == 0 ? 0 : tensor.numel() / rows;
  if (splits.empty()) {
    TORCH_CHECK_VALUE(rows % n == 0, check.prefix(), name, " has ", rows,
                      " rows, which cannot be split equally over ", n, " ranks");
  } else {
    TORCH_CHECK_VALUE(splits.size() == static_cast<std::size_t>(n), check.prefix(), name, " has ",
                      splits.size(), " split sizes, one for each of the ", n, " ranks is needed");
  }
  std::int64_t total = 0;
  for (int r = 0; r < n; ++r) {
    const std::int64_t length = splits.empty() ? rows / n : splits[r];
    TORCH_CHECK_VALUE(length >= 0, check.prefix(), name, " has the split size ", length);
    using Byte =
        std::conditional_t<std::is_const_v<std::remove_pointer_t<Pointer>>, const char, char>;
    pointers.push_back(static_cast<Byte*>(base) +
                       total * row * static_cast<std::int64_t>(tensor.element_size()));
    counts.push_back(static_cast<std::size_t>(length * row));
    total += length;
  }
  TORCH_CHECK_VALUE(total == rows, check.prefix(), name, " has ", rows,
                    " rows, but its split sizes add up to ", total);
}

}  // namespace reducer::torch_backend
