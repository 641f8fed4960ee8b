#pragma once

#include <pybind11/pybind11.h>

namespace emulator {

// Adds to a Python module the functions that set the schedule, and that return the launches and the
// findings of the race detector.
void bind_emulator(pybind11::module_& m);

}  // namespace emulator
