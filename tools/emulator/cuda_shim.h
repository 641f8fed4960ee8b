// Lets g++ compile a .cu file. Force-included before the file, with the toolkit's real headers.
//
// Types (dim3, float4, __half) are the toolkit's own. Keywords are defined away. __shared__
// variables become statics, which works because blocks run one after another. CUDA's built-in
// functions are defined here for the argument types that CUDA allows. __CUDA_ARCH__ stays
// undefined, so code behind it is not compiled.
#pragma once

#include <cuda_runtime.h>
#include <device_launch_parameters.h>

#include <cmath>
#include <cstring>
#include <type_traits>

#include "emulator.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

// Dynamic shared memory. `extern __shared__` itself cannot be emulated.
#define DYNAMIC_SHARED(T, name) T* name = emulator::dynamic_shared<T>()

namespace emulator {

NOT_TRACED inline uint3 thread_index() { return current->index; }
NOT_TRACED inline uint3 block_index() { return block.index; }
NOT_TRACED inline dim3 block_size() { return block.size; }
NOT_TRACED inline dim3 grid_size() { return block.grid; }

template <typename T>
NOT_TRACED T* dynamic_shared() {
  return static_cast<T*>(block.dynamic_shared);
}

template <typename T>
NOT_TRACED uint64_t to_word(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "at most 8 bytes are exchanged");
  uint64_t word = 0;
  __builtin_memcpy(&word, &value, sizeof(T));
  return word;
}

template <typename T>
NOT_TRACED T from_word(uint64_t word) {
  T value;
  __builtin_memcpy(&value, &word, sizeof(T));
  return value;
}

// Result of a shuffle that reads a lane outside the collective, which CUDA leaves undefined.
constexpr uint64_t kGarbage = 0xbadbadbadbadbadb;

// Exchanges values. source(lane) returns the lane to read; if negative, the lane keeps its value.
template <typename T, typename F>
NOT_TRACED T shuffle(unsigned mask, T value, const char* name, const Location& where, F source) {
  Meeting* meeting = arrive(mask, name, where);
  const int lane = int(current->lane);
  meeting->values[lane] = to_word(value);
  wait(meeting);
  const int from = source(lane);
  const uint64_t word = from < 0                        ? to_word(value)
                        : meeting->arrived >> from & 1u ? meeting->values[from]
                                                        : kGarbage;
  leave(meeting);
  return from_word<T>(word);
}

// Combines the values of all lanes of the mask.
template <typename T, typename F>
NOT_TRACED T reduce(unsigned mask, T value, const char* name, const Location& where, F combine) {
  Meeting* meeting = arrive(mask, name, where);
  const bool first = meeting->arrived == 1u << current->lane;
  meeting->folded = to_word(first ? value : combine(from_word<T>(meeting->folded), value));
  wait(meeting);
  const T result = from_word<T>(meeting->folded);
  leave(meeting);
  return result;
}

NOT_TRACED inline unsigned ballot(unsigned mask, bool predicate, const char* name,
                                  const Location& where) {
  const unsigned mine = predicate ? 1u << current->lane : 0u;
  return reduce(mask, mine, name, where, [](unsigned a, unsigned b) { return a | b; });
}

// Any atomic operation. `update` maps the old value to the new one. Threads switch only where they
// wait, so a plain read and write is indivisible.
template <typename T, typename F>
NOT_TRACED T atomic(T* p, F update) {
  if (tracer != nullptr) tracer->access(p, sizeof(T), Tracer::kAtomic, __builtin_return_address(0));
  const T old = *p;
  *p = update(old);
  return old;
}

template <typename T, typename... Allowed>
inline constexpr bool is_one_of = (std::is_same_v<T, Allowed> || ...);

// Stands for kernel<<<grid, block, shared_bytes>>>(arguments...).
template <typename... Parameters, typename... Arguments>
void launch_kernel(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared_bytes, Arguments&&... arguments) {
  auto run_thread = [&] { kernel(static_cast<Parameters>(arguments)...); };
  launch(
      name, reinterpret_cast<const void*>(kernel), grid, block, shared_bytes,
      [](void* thread) { (*static_cast<decltype(run_thread)*>(thread))(); }, &run_thread);
}

}  // namespace emulator

#define threadIdx (emulator::thread_index())
#define blockIdx (emulator::block_index())
#define blockDim (emulator::block_size())
#define gridDim (emulator::grid_size())
#define warpSize 32

// ---- Barriers, votes, shuffles -----------------------------------------------------------------
// The default of the last parameter, CALLED_FROM, records the location of the call.

#define CUDA_BUILTIN NOT_TRACED inline
#define CALLED_FROM emulator::Location where = emulator::Location::current()

CUDA_BUILTIN void __syncthreads(CALLED_FROM) { emulator::sync_threads(false, where); }
CUDA_BUILTIN int __syncthreads_count(int p, CALLED_FROM) {
  return int(emulator::sync_threads(p != 0, where));
}
CUDA_BUILTIN int __syncthreads_or(int p, CALLED_FROM) {
  return emulator::sync_threads(p != 0, where) != 0;
}
CUDA_BUILTIN int __syncthreads_and(int p, CALLED_FROM) {
  return emulator::sync_threads(p == 0, where) == 0;
}

CUDA_BUILTIN void __syncwarp(unsigned mask = 0xffffffffu, CALLED_FROM) {
  emulator::Meeting* meeting = emulator::arrive(mask, "__syncwarp", where);
  emulator::wait(meeting);
  emulator::leave(meeting);
}

CUDA_BUILTIN unsigned __ballot_sync(unsigned mask, int p, CALLED_FROM) {
  return emulator::ballot(mask, p != 0, "__ballot_sync", where);
}
CUDA_BUILTIN int __any_sync(unsigned mask, int p, CALLED_FROM) {
  return emulator::ballot(mask, p != 0, "__any_sync", where) != 0;
}
CUDA_BUILTIN int __all_sync(unsigned mask, int p, CALLED_FROM) {
  return emulator::ballot(mask, p == 0, "__all_sync", where) == 0;
}
// CUDA guarantees only the bit of the calling lane. Code that relies on other lanes fails here.
CUDA_BUILTIN unsigned __activemask() { return 1u << emulator::current->lane; }

template <typename T>
CUDA_BUILTIN T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CALLED_FROM) {
  return emulator::shuffle(mask, value, "__shfl_sync", where,
                           [=](int me) { return (me & ~(width - 1)) | (lane & (width - 1)); });
}
template <typename T>
CUDA_BUILTIN T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CALLED_FROM) {
  return emulator::shuffle(mask, value, "__shfl_up_sync", where, [=](int me) {
    return me - int(delta) < (me & ~(width - 1)) ? -1 : me - int(delta);
  });
}
template <typename T>
CUDA_BUILTIN T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                                CALLED_FROM) {
  return emulator::shuffle(mask, value, "__shfl_down_sync", where, [=](int me) {
    return me + int(delta) >= (me & ~(width - 1)) + width ? -1 : me + int(delta);
  });
}
template <typename T>
CUDA_BUILTIN T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CALLED_FROM) {
  return emulator::shuffle(mask, value, "__shfl_xor_sync", where, [=](int me) {
    return (me ^ bits) >= (me & ~(width - 1)) + width ? -1 : me ^ bits;
  });
}

#define CUDA_REDUCTION(name, combined)                                                        \
  template <typename T>                                                                       \
  CUDA_BUILTIN T name(unsigned mask, T value, CALLED_FROM) {                                  \
    static_assert(emulator::is_one_of<T, int, unsigned>, #name " takes int or unsigned");     \
    return emulator::reduce(mask, value, #name, where, [](T a, T b) { return T(combined); }); \
  }
CUDA_REDUCTION(__reduce_add_sync, unsigned(a) + unsigned(b))
CUDA_REDUCTION(__reduce_min_sync, a < b ? a : b)
CUDA_REDUCTION(__reduce_max_sync, a < b ? b : a)
CUDA_REDUCTION(__reduce_and_sync, a& b)
CUDA_REDUCTION(__reduce_or_sync, a | b)
CUDA_REDUCTION(__reduce_xor_sync, a ^ b)

CUDA_BUILTIN void __threadfence() {
  if (emulator::tracer != nullptr) emulator::tracer->fence();
}
CUDA_BUILTIN void __threadfence_block() {}
CUDA_BUILTIN void __nanosleep(unsigned) { emulator::yield(); }
CUDA_BUILTIN void __trap() { emulator::violation("__trap()"); }

// ---- Atomics, for the types that CUDA supports --------------------------------------------------

#define CUDA_ATOMIC(name, updated, ...)                                                        \
  template <typename T>                                                                        \
  CUDA_BUILTIN T name(T* p, std::type_identity_t<T> value) {                                   \
    static_assert(emulator::is_one_of<T, __VA_ARGS__>, "CUDA has no " #name " for this type"); \
    return emulator::atomic(p, [value](T old) { return T(updated); });                         \
  }
CUDA_ATOMIC(atomicAdd, old + value, int, unsigned, unsigned long long, float, double)
CUDA_ATOMIC(atomicMax, old < value ? value : old, int, unsigned, unsigned long long, long long)
CUDA_ATOMIC(atomicMin, value < old ? value : old, int, unsigned, unsigned long long, long long)
CUDA_ATOMIC(atomicOr, old | value, int, unsigned, unsigned long long)
CUDA_ATOMIC(atomicAnd, old& value, int, unsigned, unsigned long long)
CUDA_ATOMIC(atomicXor, old ^ value, int, unsigned, unsigned long long)
CUDA_ATOMIC(atomicExch, (void(old), value), int, unsigned, unsigned long long, float)
template <typename T>
CUDA_BUILTIN T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  static_assert(emulator::is_one_of<T, int, unsigned, unsigned long long>,
                "CUDA has no atomicCAS for this type");
  return emulator::atomic(p, [=](T old) { return old == expected ? value : old; });
}

// ---- Stores with a cache hint ------------------------------------------------------------------

template <typename T>
CUDA_BUILTIN void __stcs(T* p, T value) {
  static_assert(
      emulator::is_one_of<T, int, int2, int4, unsigned, uint2, uint4, float, float2, float4>,
      "__stcs stores 4, 8 or 16 bytes here");
  if (emulator::tracer != nullptr)
    emulator::tracer->access(p, sizeof(T), emulator::Tracer::kWrite, __builtin_return_address(0));
  *p = value;
}

// ---- Bits and rounding -------------------------------------------------------------------------

CUDA_BUILTIN unsigned __float_as_uint(float v) {
  return emulator::from_word<unsigned>(emulator::to_word(v));
}
CUDA_BUILTIN float __uint_as_float(unsigned v) { return emulator::from_word<float>(v); }
CUDA_BUILTIN int __float_as_int(float v) { return int(__float_as_uint(v)); }
CUDA_BUILTIN float __int_as_float(int v) { return __uint_as_float(unsigned(v)); }
CUDA_BUILTIN long long __double_as_longlong(double v) { return (long long)emulator::to_word(v); }
CUDA_BUILTIN double __longlong_as_double(long long v) {
  return emulator::from_word<double>(uint64_t(v));
}
CUDA_BUILTIN unsigned __umulhi(unsigned a, unsigned b) {
  return unsigned((unsigned long long)a * b >> 32);
}
// Four bytes of a (numbers 0 to 3) and b (4 to 7), whose numbers are the digits of the selector.
CUDA_BUILTIN unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const unsigned long long bytes = (unsigned long long)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return result;
}
CUDA_BUILTIN int __popc(unsigned v) { return __builtin_popcount(v); }
CUDA_BUILTIN int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
CUDA_BUILTIN int __ffs(int v) { return __builtin_ffs(v); }
CUDA_BUILTIN int __ffsll(long long v) { return __builtin_ffsll(v); }
CUDA_BUILTIN int __clz(int v) { return v == 0 ? 32 : __builtin_clz(unsigned(v)); }
CUDA_BUILTIN int __clzll(long long v) {
  return v == 0 ? 64 : __builtin_clzll((unsigned long long)v);
}

// As in CUDA, if one of two floating-point numbers is NaN, the result is the other one.
template <typename A, typename B>
CUDA_BUILTIN std::common_type_t<A, B> min(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return std::fmin(a, b);
  return b < a ? b : a;
}
template <typename A, typename B>
CUDA_BUILTIN std::common_type_t<A, B> max(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return std::fmax(a, b);
  return a < b ? b : a;
}
