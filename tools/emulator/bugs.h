#pragma once

#include <string>
#include <vector>

// Launches a kernel of bugs.cu by its name and returns a part of its output.
std::vector<float> run_bug(const std::string& name);
// Launches a kernel of handover_bugs.cu by its name and returns the sum that it computes.
float run_handover(const std::string& name);
