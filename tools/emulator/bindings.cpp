// The emulator's interface for the tests: a pybind11 module in the same library as the kernels.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <utility>

#include "emulator.h"

namespace py = pybind11;

namespace emulator {
namespace {

py::tuple size_tuple(const dim3& v) { return py::make_tuple(v.x, v.y, v.z); }

void set_schedule(const std::string& order, uint64_t seed) {
  if (order == "fifo") {
    settings.order = Order::kFifo;
  } else if (order == "lifo") {
    settings.order = Order::kLifo;
  } else if (order == "random") {
    settings.order = Order::kRandom;
  } else {
    throw py::value_error("expected fifo, lifo or random, got " + order);
  }
  settings.random_state = seed * 0x9e3779b97f4a7c15u + 1;
  if (settings.random_state == 0) settings.random_state = 1;  // xorshift never leaves 0
}

}  // namespace

void bind_emulator(py::module_& m) {
  m.attr("TRACES") = tracer != nullptr;
  m.def(
      "take_races", [] { return tracer ? tracer->take_races() : std::vector<std::string>(); },
      "Return the findings of the race detector since the last call.");
  m.def("set_schedule", &set_schedule, py::arg("order"), py::arg("seed") = 1);
  m.def("set_strict", [](bool strict) { settings.strict = strict; });
  m.def(
      "set_sample",
      [](size_t blocks, unsigned images, unsigned first_images) {
        settings.sample = {blocks, images, first_images};
      },
      py::arg("blocks") = 0, py::arg("images") = 0, py::arg("first_images") = 0);
  m.def("set_profile", [](bool profile) { settings.profile = profile; });
  m.def(
      "take_launches", [] { return std::exchange(launches, {}); },
      "Return the launches since the last call.");

  // Local to the module, because a test loads two such modules.
  py::class_<Traffic>(m, "Traffic", py::module_local())
      .def_readonly("bytes_read", &Traffic::bytes_read)
      .def_readonly("bytes_written", &Traffic::bytes_written)
      .def_readonly("bytes_fetched", &Traffic::bytes_fetched)
      .def_readonly("reads", &Traffic::reads)
      .def_readonly("writes", &Traffic::writes)
      .def_readonly("wide_reads", &Traffic::wide_reads)
      .def_readonly("wide_writes", &Traffic::wide_writes);
  py::class_<WideAccesses>(m, "WideAccesses", py::module_local())
      .def_readonly("count", &WideAccesses::count)
      .def("shortest",
           [](const WideAccesses& wide, unsigned accesses) {
             if (accesses == 0 || accesses > WideAccesses::kMost)
               throw py::value_error("expected 1 to 8 accesses in an iteration, got " +
                                     std::to_string(accesses));
             return wide.shortest[accesses];
           })
      .def_readonly("cycles", &WideAccesses::cycles);
  py::class_<Cost>(m, "Cost", py::module_local())
      .def_readonly("warp_instructions", &Cost::warp_instructions)
      .def_readonly("intervals", &Cost::intervals)
      .def_readonly("spans", &Cost::spans)
      .def_readonly("one_warp_cycles", &Cost::one_warp_cycles)
      .def_readonly("global_atomics", &Cost::global_atomics)
      .def_readonly("shared_atomics", &Cost::shared_atomics)
      .def_readonly("hottest_atomics", &Cost::hottest_atomics)
      .def_readonly("wide_loads", &Cost::wide_loads)
      .def_readonly("wide_stores", &Cost::wide_stores)
      .def_readonly("profile", &Cost::profile);
  py::class_<Launch>(m, "Launch", py::module_local())
      .def_readonly("kernel", &Launch::kernel)
      .def_readonly("function", &Launch::function)
      .def_readonly("shared_bytes", &Launch::shared_bytes)
      .def_readonly("traffic", &Launch::traffic)
      .def_readonly("cost", &Launch::cost)
      .def_property_readonly("grid", [](const Launch& l) { return size_tuple(l.grid); })
      .def_property_readonly("block", [](const Launch& l) { return size_tuple(l.block); })
      .def("__repr__", [](const py::object& l) {
        return py::str("{}<<<{}, {}, {}>>>")
            .format(l.attr("kernel"), l.attr("grid"), l.attr("block"), l.attr("shared_bytes"));
      });
}

}  // namespace emulator
