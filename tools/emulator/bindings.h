#pragma once

#include <pybind11/pybind11.h>

namespace emulator {

// Adds schedule, launch log and findings to a Python module.
void bind_emulator(pybind11::module_& m);

}  // namespace emulator
