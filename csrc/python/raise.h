// A Status as Python's exceptions.
#pragma once

#include <pybind11/pybind11.h>

#include <utility>

#include "common/status.h"

namespace reducer::python {

/// Raises the exception of reducer.errors that stands for a Status.
[[noreturn]] inline void raise(const Status& status) {
  const pybind11::object error =
      pybind11::module_::import("reducer.errors")
          .attr("from_code")(static_cast<int>(status.code()), status.message());
  PyErr_SetObject(pybind11::type::of(error).ptr(), error.ptr());
  throw pybind11::error_already_set();
}

template <class T>
T valueOf(Result<T> result) {
  if (!result.ok()) raise(result.status());
  return std::move(result).value();
}

}  // namespace reducer::python
