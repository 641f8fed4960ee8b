// The race detector's findings (tracer.cpp).
#pragma once

#include <string>
#include <vector>

namespace emulator {

// Every race and every read of uninitialised shared memory since the last call, one line each.
std::vector<std::string> take_races();

}  // namespace emulator
