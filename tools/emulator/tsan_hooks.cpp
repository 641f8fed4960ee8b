// The functions that -fsanitize=thread calls at each memory access, in place of libtsan's. Compiled
// without -fsanitize=thread.
#include "emulator.h"

using emulator::Tracer;

#define TRACE(name, size, kind)                                                   \
  void __tsan_##name(void* p) {                                                   \
    emulator::tracer->access(p, size, Tracer::kind, __builtin_return_address(0)); \
  }
#define TRACE_SIZE(n)                  \
  TRACE(read##n, n, kRead)             \
  TRACE(write##n, n, kWrite)           \
  TRACE(unaligned_read##n, n, kRead)   \
  TRACE(unaligned_write##n, n, kWrite) \
  TRACE(volatile_read##n, n, kRead)    \
  TRACE(volatile_write##n, n, kWrite)

extern "C" {
TRACE_SIZE(1)
TRACE_SIZE(2)
TRACE_SIZE(4)
TRACE_SIZE(8)
TRACE_SIZE(16)
void __tsan_read_range(void* p, size_t size) {
  emulator::tracer->access(p, size, Tracer::kRead, __builtin_return_address(0));
}
void __tsan_write_range(void* p, size_t size) {
  emulator::tracer->access(p, size, Tracer::kWrite, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
}

// The host code of the kernels' files uses atomics for reference counts and to guard statics.
#define HOST_ATOMICS(bits, T)                                                                      \
  extern "C" T __tsan_atomic##bits##_load(const T* p, int) {                                       \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  extern "C" void __tsan_atomic##bits##_store(T* p, T v, int) {                                    \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                \
  extern "C" T __tsan_atomic##bits##_exchange(T* p, T v, int) {                                    \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                \
  extern "C" T __tsan_atomic##bits##_fetch_add(T* p, T v, int) {                                   \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  extern "C" T __tsan_atomic##bits##_fetch_sub(T* p, T v, int) {                                   \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  extern "C" int __tsan_atomic##bits##_compare_exchange_strong(T* p, T* expected, T v, int, int) { \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
HOST_ATOMICS(8, uint8_t)
HOST_ATOMICS(32, uint32_t)
HOST_ATOMICS(64, uint64_t)
