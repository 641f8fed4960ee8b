// The Python module `planted_bugs`: the emulator, and kernels whose bugs it must find.
#include <pybind11/stl.h>

#include "bindings.h"
#include "bugs.h"

PYBIND11_MODULE(planted_bugs, m) {
  emulator::bind_emulator(m);
  m.def("run", &run_bug);
  m.def("run_handover", &run_handover);
}
