// Runs CUDA kernels on the CPU: the interface between kernels (through cuda_shim.h), the scheduler
// (scheduler.cpp), the tracers (tracer.cpp, cost_tracer.cpp) and the tests (bindings.cpp).
//
// Blocks run one after another. The threads of a block are fibers on one OS thread. A fiber runs
// until its thread waits for others, and the schedule chooses which fiber is resumed next. There is
// no lockstep: the lanes of a warp synchronise in its collectives only.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

#include "cost.h"

// Marks code between a kernel and the emulator, so that the tracer sees only the kernel's accesses
// and basic blocks.
#define NOT_TRACED __attribute__((no_sanitize("thread"), no_sanitize_coverage))

namespace emulator {

using Location = std::source_location;

struct Fiber;

struct Thread {
  enum State { kFresh, kReady, kAtBarrier, kInCollective, kReturned };

  uint3 index;
  unsigned rank, lane, warp;  // rank: within the block
  // Numbers of block and warp barriers passed so far. The race detector orders accesses by these.
  unsigned block_barriers, warp_barriers;
  unsigned fences;  // number of __threadfence passed so far
  State state;
  Location where;  // location of the collective in which the thread waits
  Fiber* fiber;
};

struct Block {
  uint3 index;
  dim3 size, grid;
  unsigned rank;  // within the grid
  void* dynamic_shared;
};

// The running thread, null outside kernels, and its block.
extern Thread* current;
extern Block block;

// What a launch reads from and writes to global memory. All zero in variants without a tracer.
struct Traffic {
  int64_t bytes_read = 0, bytes_written = 0;  // sum of the sizes of all accesses
  int64_t bytes_fetched = 0;                  // reads that miss a small cache (tracer.cpp)
  int64_t reads = 0, writes = 0;              // number of accesses
  int64_t wide_reads = 0, wide_writes = 0;    // number of 16-byte accesses
};

struct Launch {
  std::string kernel;
  uintptr_t function;  // the offset of the template's instance in the library
  dim3 grid, block;
  size_t shared_bytes;  // dynamic
  Traffic traffic;
  Cost cost;  // empty in variants other than `cost`
};

enum class Order { kFifo, kLifo, kRandom };

// The blocks of each launch that run, all by default. With fewer, the results are incomplete.
struct Sample {
  size_t blocks = 0;  // about how many, evenly spaced; 0: all
  // If a grid has the size `images` in y, or else in x, only the blocks of the `first_images` first
  // images run. With 0, all blocks run.
  unsigned images = 0, first_images = 0;

  bool contains(uint32_t rank, const dim3& grid) const;
};

struct Settings {
  Order order = Order::kFifo;
  uint64_t random_state = 1;
  // Whether behaviour that CUDA leaves undefined, or that only some devices allow, is an error.
  bool strict = true;
  Sample sample;
  bool profile = false;  // whether the variant `cost` fills Cost::profile
};

extern Settings settings;
extern std::vector<Launch> launches;  // since the tests last took them

// Receives every memory access of the kernels, and the progress of their blocks.
class Tracer {
 public:
  enum Kind { kRead, kWrite, kAtomic };
  virtual void begin_launch(Launch& launch, const void* dynamic_shared, size_t shared_bytes) = 0;
  virtual void access(const void* address, size_t size, Kind kind, const void* code) = 0;
  // The running thread executes __threadfence.
  virtual void fence() {}
  // Returns every race and every read of uninitialised shared memory since the last call, one line
  // each.
  virtual std::vector<std::string> take_races() = 0;
  virtual void begin_block(unsigned /*threads*/) {}
  virtual void end_block() {}
  virtual void barrier_opens() {}  // all threads of the block have arrived
  virtual void collective() {}     // the running thread takes part in a collective of its warp

 protected:
  ~Tracer() = default;
};
extern Tracer* tracer;  // null in variants without a tracer

// Runs body(argument), which calls the kernel at `function`, once for every thread of the grid.
// Throws std::runtime_error at the first violation of CUDA's rules, and abandons the threads that
// have not finished.
void launch(const char* kernel, const void* function, dim3 grid, dim3 block, size_t shared_bytes,
            void (*body)(void*), void* argument);

// Ends the launch with an error that names the kernel, the block and the thread.
[[noreturn]] void violation(const std::string& what);

std::string describe(const Location& where);

// Whether the address is on the stack of a CUDA thread.
bool is_thread_private(const void* address);

// The barrier of the block. Returns the number of threads whose predicate is true.
unsigned sync_threads(bool predicate, const Location& where);

// A warp collective of the lanes in `mask`. A lane arrives, stores its value or folds it into the
// common one, waits for the other lanes, reads, and leaves.
struct Meeting {
  unsigned mask, arrived, still_inside;
  const char* name;
  Location where;
  uint64_t folded;
  uint64_t values[32];
};
Meeting* arrive(unsigned mask, const char* name, const Location& where);
void wait(Meeting* meeting);
void leave(Meeting* meeting);

// Lets other threads of the block run.
void yield();

}  // namespace emulator
