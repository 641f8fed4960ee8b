// Runs CUDA kernels on the CPU: the interface between kernels (through cuda_shim.h), the scheduler
// (scheduler.cpp), the tracer of memory accesses (tracer.cpp) and the tests (bindings.cpp).
//
// Blocks run one after another, the threads of a block as fibers on one OS thread.  A fiber runs
// until its thread waits for others; which one is resumed next is the schedule's choice.  There is
// no lockstep: a warp's lanes meet in its collectives and nowhere else.
#pragma once

#include <vector_types.h>

#include <cstdint>
#include <source_location>
#include <string>
#include <vector>

// For code that stands between a kernel and the emulator, so that the tracer sees only the kernel's
// own accesses.
#define NOT_TRACED __attribute__((no_sanitize("thread")))

namespace emulator {

using Location = std::source_location;

struct Fiber;

struct Thread {
  enum State { kFresh, kReady, kAtBarrier, kInCollective, kReturned };

  uint3 index;
  unsigned rank, lane, warp;  // rank: within the block
  // Barriers of the block and of the warp passed so far: the race detector orders accesses by them.
  unsigned block_barriers, warp_barriers;
  State state;
  Location where;  // of the collective that the thread waits in
  Fiber* fiber;
};

struct Block {
  uint3 index;
  dim3 size, grid;
  unsigned rank;  // within the grid
  void* dynamic_shared;
};

// The thread that runs, null outside of kernels, and its block.
extern Thread* current;
extern Block block;

// What a launch moved from and to global memory; zero where no tracer is built in.
struct Traffic {
  int64_t bytes_read = 0, bytes_written = 0;  // as the threads asked for them
  int64_t bytes_fetched = 0;                  // read and not found in a small cache (tracer.cpp)
  int64_t reads = 0, writes = 0;              // accesses
  int64_t wide_reads = 0, wide_writes = 0;    // accesses of 16 bytes
};

struct Launch {
  std::string kernel;
  dim3 grid, block;
  size_t shared_bytes;  // dynamic
  Traffic traffic;
};

enum class Order { kFifo, kLifo, kRandom };

struct Settings {
  Order order = Order::kFifo;
  uint64_t random_state = 1;
  bool strict = true;  // what CUDA leaves undefined or only some devices allow is an error
};

extern Settings settings;
extern std::vector<Launch> launches;  // all since the tests cleared it

// Sees every access of the kernels.
class Tracer {
 public:
  enum Kind { kRead, kWrite, kAtomic };
  virtual void begin_launch(Launch& launch, const void* dynamic_shared, size_t shared_bytes) = 0;
  virtual void access(const void* address, size_t size, Kind kind, const void* code) = 0;
  // Every race and every read of uninitialised shared memory since the last call, one line each.
  virtual std::vector<std::string> take_races() = 0;

 protected:
  ~Tracer() = default;
};
extern Tracer* tracer;  // null in the variants without one

// Runs body(argument) once for every thread of the grid.  Throws std::runtime_error for the first
// violation of CUDA's rules; the threads not yet done are then abandoned where they are.
void launch(const char* kernel, dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*),
            void* argument);

// Ends the launch with an error that names the running kernel, block and thread.
[[noreturn]] void violation(const std::string& what);

std::string describe(const Location& where);

// Whether the address is on the stack of a CUDA thread.
bool is_thread_private(const void* address);

// The barrier of the block: returns in how many threads the predicate held.
unsigned sync_threads(bool predicate, const Location& where);

// A warp collective: the lanes of `mask` meet, and each leaves a value or folds it into one.  A
// lane arrives, deposits, waits for the others, reads, and leaves.
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
