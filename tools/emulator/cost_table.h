// The table that cost_weights.py makes of this library: its basic blocks and its loads.
#pragma once

#include <cstdint>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

class CostTable {
 public:
  bool loaded() const { return !weights_.empty(); }

  void load(const std::string& path, size_t library_bytes) {
    basic_blocks_.assign(library_bytes, -1);
    loads_.assign(library_bytes, -1);
    std::ifstream file(path);
    std::string line, kind;
    while (std::getline(file, line)) {
      std::istringstream words(line);
      size_t offset = 0;
      words >> kind >> std::hex >> offset;
      if (!words || offset >= library_bytes)
        throw std::runtime_error(path + ": expected an offset, got " + line);
      if (kind == "block") {
        basic_blocks_[offset] = int(weights_.size());
        words >> weights_.emplace_back();
        offsets_.push_back(offset);
      } else {
        loads_[offset] = int(waits_.size());
        std::vector<uint32_t>& others = waits_.emplace_back();
        while (words >> offset) others.push_back(uint32_t(offset));
      }
    }
    if (!loaded()) throw std::runtime_error("no basic blocks in " + path);
  }

  // Returns the number of the basic block that begins at this offset, or -1.
  int basic_block(size_t offset) const {
    return offset < basic_blocks_.size() ? basic_blocks_[offset] : -1;
  }
  size_t basic_blocks() const { return weights_.size(); }
  double weight(int basic_block) const { return weights_[basic_block]; }
  uint64_t offset(int basic_block) const { return offsets_[basic_block]; }

  // Returns the loads for which the load at this offset waits.
  const std::vector<uint32_t>& waits(size_t offset) const {
    static const std::vector<uint32_t> none;
    const int load = offset < loads_.size() ? loads_[offset] : -1;
    return load < 0 ? none : waits_[load];
  }

 private:
  std::vector<int> basic_blocks_, loads_;  // numbers by offset
  std::vector<double> weights_;            // by number of the basic block
  std::vector<uint64_t> offsets_;
  std::vector<std::vector<uint32_t>> waits_;  // by number of the load
};

}  // namespace emulator
