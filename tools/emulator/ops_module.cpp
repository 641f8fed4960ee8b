// Makes the library of emulated ops a Python module, `retinanet_ops._C`.
#include "bindings.h"

PYBIND11_MODULE(_C, m) { emulator::bind_emulator(m); }
