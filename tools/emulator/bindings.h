#pragma once

#include <pybind11/pybind11.h>

namespace emulator {

// Adds the schedule, the log of launches and the findings to a Python module.
void bind_emulator(pybind11::module_& m);

}  // namespace emulator
