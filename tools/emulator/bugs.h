#pragma once

#include <string>
#include <vector>

// Launches a kernel of bugs.cu by its name and returns a part of its output.
std::vector<float> run_bug(const std::string& name);
