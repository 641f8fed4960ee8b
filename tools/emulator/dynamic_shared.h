// The buffer of a launch's dynamic shared memory.
#pragma once

#include <cstdlib>
#include <cstring>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace emulator {

// A buffer exactly as large as requested, so that AddressSanitizer detects accesses past the end.
class DynamicShared {
 public:
  explicit DynamicShared(size_t size) : size_(size), memory_(nullptr) {
    if (size == 0) return;
    memory_ = std::aligned_alloc(16, rounded());
#ifdef __SANITIZE_ADDRESS__
    __asan_poison_memory_region(static_cast<char*>(memory_) + size, rounded() - size);
#endif
  }
  DynamicShared(const DynamicShared&) = delete;
  ~DynamicShared() {
#ifdef __SANITIZE_ADDRESS__
    if (memory_ != nullptr) __asan_unpoison_memory_region(memory_, rounded());
#endif
    std::free(memory_);
  }

  // Fills the buffer with NaN in every floating-point type, so that no block can use a value of the
  // previous one.
  void forget() {
    if (size_ > 0) std::memset(memory_, 0xff, size_);
  }
  void* get() const { return memory_; }

 private:
  size_t rounded() const { return (size_ + 15) / 16 * 16; }

  size_t size_;
  void* memory_;
};

}  // namespace emulator
