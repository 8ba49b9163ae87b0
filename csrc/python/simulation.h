// simulate::Simulation for Python.
#pragma once

#include <pybind11/pybind11.h>

namespace reducer::python {

void addSimulation(pybind11::module_& module);

}  // namespace reducer::python
