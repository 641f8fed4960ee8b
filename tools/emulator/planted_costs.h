#pragma once

#include <string>

// Launches a kernel of planted_costs.cu by its name.
void run_planted_cost(const std::string& name);
