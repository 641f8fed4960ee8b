// The Python module `planted_costs`: the emulator, and kernels that the cost model must object to.
#include <pybind11/stl.h>

#include "bindings.h"
#include "planted_costs.h"

PYBIND11_MODULE(planted_costs, m) {
  emulator::bind_emulator(m);
  m.def("run", &run_planted_cost);
}
