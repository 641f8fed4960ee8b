// Kernels in which blocks hand data to each other, right ones and ones with a planted bug each, for
// tests/tools/test_handovers.py. In each of them, the block that is the last to take a ticket adds
// the values of all blocks. All compile with nvcc without a warning.
#include <cstring>
#include <functional>
#include <map>
#include <vector>

#include "bugs.h"

namespace {

constexpr unsigned kThreads = 64;
constexpr unsigned kBlocks = 5;
constexpr unsigned kValues = kBlocks * kThreads;
constexpr unsigned kFullMask = 0xffffffffu;

// What the blocks share. `values` has one element per thread of the grid. The tickets start at 0.
struct Memory {
  float* values;
  unsigned* tickets;
  float* sum;
};

__device__ void write_value(const Memory& memory) {
  memory.values[blockIdx.x * kThreads + threadIdx.x] = float(blockIdx.x + threadIdx.x % 7);
}

__device__ void add_values(const Memory& memory) {
  float sum = 0;
  for (unsigned i = 0; i < kValues; ++i) sum += memory.values[i];  // BUG: read of the values
  *memory.sum = sum;
}

enum Bug {
  kNone,
  kNoReleaseFence,
  kReleaseFenceBeforeBarrier,
  kReleaseFenceOfTheBlock,
  kNoAcquireFence,
  kAcquireFenceBeforeTicket,
  kAcquireFenceAfterBarrier,
  kReleaseOfAnotherTicket,
  kPlainReadOfTicket,
  kReadBeforeTicket,
};

// Thread 0 hands over what its block wrote. In the last block, it takes over for thread 5.
template <Bug kBug>
__global__ void hand_over(Memory memory) {
  __shared__ bool is_last;
  write_value(memory);
  if (kBug == kReleaseFenceBeforeBarrier) __threadfence();
  if (kBug == kReadBeforeTicket && threadIdx.x == 0)
    *memory.sum = memory.values[(blockIdx.x + 1) % kBlocks * kThreads];  // BUG: kReadBeforeTicket
  __syncthreads();
  if (kBug == kReleaseOfAnotherTicket && threadIdx.x == 32) {
    __threadfence();
    atomicAdd(memory.tickets + 1, 1u);
  }
  if (threadIdx.x == 0) {
    if (kBug == kReleaseFenceOfTheBlock) __threadfence_block();
    if (kBug != kNoReleaseFence && kBug != kReleaseFenceBeforeBarrier &&
        kBug != kReleaseFenceOfTheBlock && kBug != kReleaseOfAnotherTicket)
      __threadfence();
    const unsigned before = atomicAdd(memory.tickets, 1u);
    is_last = before == gridDim.x - 1;
    if (kBug == kPlainReadOfTicket)
      is_last = *memory.tickets == gridDim.x;  // BUG: kPlainReadOfTicket
    if (kBug != kNoAcquireFence && kBug != kAcquireFenceBeforeTicket &&
        kBug != kAcquireFenceAfterBarrier)
      __threadfence();
  }
  __syncthreads();
  if (kBug == kAcquireFenceAfterBarrier) __threadfence();
  if (is_last && threadIdx.x == 5) add_values(memory);
}

// The last block may overwrite what all blocks wrote and read, the ticket included.
__global__ void reuse(Memory memory) {
  __shared__ bool is_last;
  write_value(memory);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(memory.tickets, 1u) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!is_last) return;
  if (threadIdx.x == 0) *memory.tickets = 0;
  if (threadIdx.x == 5) add_values(memory);
  __syncthreads();
  for (unsigned i = threadIdx.x; i < kValues; i += kThreads) memory.values[i] = 1;
}

// Lane 0 of each warp hands over and takes over for its warp.
__global__ void warps(Memory memory) {
  write_value(memory);
  __syncwarp();
  unsigned before = 0;
  if (threadIdx.x % 32 == 0) {
    __threadfence();
    before = atomicAdd(memory.tickets, 1u);
    __threadfence();
  }
  __syncwarp();
  before = __shfl_sync(kFullMask, before, 0);
  if (before == gridDim.x * (kThreads / 32) - 1 && threadIdx.x % 32 == 3) add_values(memory);
}

// The last block of each pair takes a second ticket for both. The last of all adds the values of
// blocks that have never used the same ticket as itself.
__global__ void chain(Memory memory) {
  const unsigned pairs = (gridDim.x + 1) / 2, pair = blockIdx.x / 2;
  const unsigned in_pair = 2 * pair + 1 == gridDim.x ? 1 : 2;
  write_value(memory);
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(memory.tickets + 1 + pair, 1u) != in_pair - 1) return;
  __threadfence();
  if (atomicAdd(memory.tickets, 1u) != pairs - 1) return;
  __threadfence();
  add_values(memory);
}

// The same without the fence between the tickets, so that a pair's other block is left out.
__global__ void broken_chain(Memory memory) {
  const unsigned pairs = (gridDim.x + 1) / 2, pair = blockIdx.x / 2;
  const unsigned in_pair = 2 * pair + 1 == gridDim.x ? 1 : 2;
  write_value(memory);
  __syncthreads();
  if (threadIdx.x != 0) return;
  __threadfence();
  if (atomicAdd(memory.tickets + 1 + pair, 1u) != in_pair - 1) return;
  if (atomicAdd(memory.tickets, 1u) != pairs - 1) return;
  __threadfence();
  add_values(memory);
}

}  // namespace

float run_handover(const std::string& name) {
  std::vector<float> values(kValues);
  std::vector<unsigned> tickets(2 + kBlocks);
  float sum = 0;
  const Memory memory{values.data(), tickets.data(), &sum};
  const std::map<std::string, void (*)(Memory)> kernels = {
      {"kNone", hand_over<kNone>},
      {"kNoReleaseFence", hand_over<kNoReleaseFence>},
      {"kReleaseFenceBeforeBarrier", hand_over<kReleaseFenceBeforeBarrier>},
      {"kReleaseFenceOfTheBlock", hand_over<kReleaseFenceOfTheBlock>},
      {"kNoAcquireFence", hand_over<kNoAcquireFence>},
      {"kAcquireFenceBeforeTicket", hand_over<kAcquireFenceBeforeTicket>},
      {"kAcquireFenceAfterBarrier", hand_over<kAcquireFenceAfterBarrier>},
      {"kReleaseOfAnotherTicket", hand_over<kReleaseOfAnotherTicket>},
      {"kPlainReadOfTicket", hand_over<kPlainReadOfTicket>},
      {"kReadBeforeTicket", hand_over<kReadBeforeTicket>},
      {"reuse", reuse},
      {"warps", warps},
      {"chain", chain},
      {"broken_chain", broken_chain},
  };
  emulator::launch_kernel(name.c_str(), kernels.at(name), kBlocks, kThreads, 0, memory);
  return sum;
}
