// Counts the work and the span of emulated kernels, for the variant `cost`.
//
// Kernels are compiled with -fsanitize=thread, which calls a function at each memory access, and
// with -fsanitize-coverage=trace-pc, which does so at each basic block. cost_weights.py estimates
// from the disassembly how many instructions of a GPU each basic block stands for, and writes its
// table beside the library. This file is compiled without either option.
//
// Work: between two barriers a warp executes each basic block as often as the lane that executes it
// most. Span: the time between two barriers is the longest of three: that of the block's slowest
// thread, that of the instructions of its slowest warp, and the time that a multiprocessor takes to
// issue the block's instructions. A block's span is the sum of these times.
//
// The loop that accesses packs is counted once more by its accesses and its shortest iteration
// (cost_wide.h), so that predict.py can put the number of instructions in the machine code in place
// of the estimate.
#include <algorithm>
#include <array>
#include <unordered_map>

#include "cost_table.h"
#include "cost_thread.h"
#include "cost_wide.h"
#include "emulator.h"
#include "memory_map.h"
#include "traffic_counter.h"

namespace emulator {
namespace {

constexpr unsigned kLanes = 32, kMaxWarps = 32;
constexpr size_t kWide = 16;  // bytes of a wide access
// A warp is busy alone if every other one takes less than this share of its time.
constexpr double kIdle = 0.25;

// How often each lane of a warp executed each basic block since the last barrier.
class WarpCounts {
 public:
  void resize(size_t basic_blocks) { slots_.assign(basic_blocks, -1); }

  void add(int basic_block, unsigned lane) {
    int& slot = slots_[basic_block];
    if (slot < 0) {
      slot = int(executed_.size());
      executed_.push_back(basic_block);
      if (counts_.size() < executed_.size()) counts_.emplace_back();
      counts_[slot].fill(0);
    }
    ++counts_[slot][lane];
  }

  // Calls visit(basic block, executions of the warp) for each basic block, and forgets them all.
  template <typename Visit>
  void take(Visit visit) {
    for (size_t i = 0; i < executed_.size(); ++i) {
      visit(executed_[i], *std::max_element(counts_[i].begin(), counts_[i].end()));
      slots_[executed_[i]] = -1;
    }
    executed_.clear();
  }

 private:
  std::vector<int> slots_;     // index in counts_ by basic block, or -1
  std::vector<int> executed_;  // basic block by index
  std::vector<std::array<uint32_t, kLanes>> counts_;
};

class CostTracer final : public Tracer {
 public:
  void begin_launch(Launch& launch, const void* shared, size_t shared_bytes) override {
    if (!table_.loaded()) {
      table_.load(MemoryMap::library_path() + ".weights",
                  memory_.module().end - memory_.module().begin);
      for (WarpCounts& warp : warps_) warp.resize(table_.basic_blocks());
    }
    launch_ = &launch;
    memory_.begin_launch(shared, shared_bytes);
    traffic_.begin_launch(launch.traffic);
    wide_[kRead].begin_launch(launch.cost.wide_loads);
    wide_[kWrite].begin_launch(launch.cost.wide_stores);
    atomics_.clear();
  }

  void begin_block(unsigned threads) override {
    threads_ = threads;
    span_ = 0;
    for (unsigned t = 0; t < threads; ++t) times_[t] = ThreadTime();
    for (WideCounter& counter : wide_) counter.begin_block(threads);
  }

  void barrier_opens() override { end_interval(); }

  void end_block() override {
    end_interval();
    launch_->cost.spans.push_back(span_);
  }

  void collective() override { times_[current->rank].collective(); }

  void basic_block(const void* code) {
    if (!in_kernel()) return;
    const int number = table_.basic_block(uintptr_t(code) - memory_.module().begin);
    if (number < 0) return;
    times_[current->rank].execute(table_.weight(number));
    warps_[current->warp].add(number, current->lane);
  }

  void access(const void* address, size_t size, Kind kind, const void* code) override {
    if (!in_kernel()) return;
    const uintptr_t p = uintptr_t(address);
    const MemoryMap::Space space = memory_.space(p);
    if (space == MemoryMap::kOther) return;
    ThreadTime& time = times_[current->rank];
    Cost& cost = launch_->cost;
    const bool shared = space == MemoryMap::kShared;
    if (size == kWide && !shared && kind != kAtomic)
      wide_[kind].access(current->rank, uint32_t(uintptr_t(code) - memory_.module().begin),
                         time.instructions());
    const double latency = shared ? cycles::kShared : latency_of(traffic_.count(p, size, kind));
    if (kind == kRead) {
      const size_t site = uintptr_t(code) - memory_.module().begin;
      time.load(latency, uint32_t(site), table_.waits(site));
    } else if (kind == kAtomic) {
      (shared ? cost.shared_atomics : cost.global_atomics) += 1;
      time.wait(shared ? cycles::kSharedAtomic : cycles::kGlobalAtomic);
      if (!shared) cost.hottest_atomics = std::max(cost.hottest_atomics, ++atomics_[p]);
    }
  }

  std::vector<std::string> take_races() override { return {}; }

 private:
  // Host code is compiled with the same options. It does not run on a thread's stack.
  static bool in_kernel() {
    return current != nullptr && is_thread_private(__builtin_frame_address(0));
  }

  static double latency_of(TrafficCounter::Source source) {
    return source == TrafficCounter::kMemory ? cycles::kMemory
           : source == TrafficCounter::kL2   ? cycles::kL2
                                             : cycles::kL1;
  }

  void end_interval() {
    Cost& cost = launch_->cost;
    double slowest = 0, second = 0, instructions = 0;
    double accesses[2] = {0, 0}, of_slowest[2] = {0, 0};  // wide ones, of all warps and the slowest
    const unsigned warps = (threads_ + kLanes - 1) / kLanes;
    for (unsigned w = 0; w < warps; ++w) {
      const double issued = take_instructions(warps_[w]);
      instructions += issued;
      // The branches of a divergent warp run one after another, so it takes no less than its
      // instructions do.
      double time = issued * cycles::kPace;
      uint32_t of_warp[2] = {0, 0};  // wide accesses
      for (unsigned t = w * kLanes; t < std::min(threads_, (w + 1) * kLanes); ++t) {
        time = std::max(time, times_[t].cycles());
        for (const Kind kind : {kRead, kWrite})
          of_warp[kind] =
              std::max(of_warp[kind], wide_[kind].end_interval(t, times_[t].instructions()));
        times_[t].reset();
      }
      for (const Kind kind : {kRead, kWrite}) {
        wide_[kind].count(of_warp[kind]);
        accesses[kind] += of_warp[kind];
        if (time > slowest) of_slowest[kind] = of_warp[kind];
      }
      second = std::max(second, std::min(time, slowest));
      slowest = std::max(slowest, time);
    }
    const double time = std::max(slowest, instructions / kIssueRate);
    for (const Kind kind : {kRead, kWrite})
      wide_[kind].add_cycles(time > slowest ? accesses[kind] / kIssueRate
                                            : of_slowest[kind] * cycles::kPace);
    span_ += time + cycles::kBarrier;
    if (warps > 1 && second < kIdle * slowest) cost.one_warp_cycles += time;
    cost.warp_instructions += instructions;
    cost.intervals += 1;
  }

  double take_instructions(WarpCounts& warp) {
    double sum = 0;
    warp.take([&](int basic_block, uint32_t executions) {
      const double instructions = executions * table_.weight(basic_block);
      sum += instructions;
      if (settings.profile) launch_->cost.profile[table_.offset(basic_block)] += instructions;
    });
    return sum;
  }

  MemoryMap memory_;
  TrafficCounter traffic_;
  CostTable table_;
  Launch* launch_ = nullptr;
  std::unordered_map<uintptr_t, double> atomics_;  // by address
  WideCounter wide_[2];                            // by Kind: loads and stores
  WarpCounts warps_[kMaxWarps];
  ThreadTime times_[kMaxWarps * kLanes];
  unsigned threads_ = 0;
  double span_ = 0;  // of the running block
};

CostTracer* cost_tracer = nullptr;

// Runs before the constructors of the files that are compiled with -fsanitize=thread.
__attribute__((constructor(101))) void install() { tracer = cost_tracer = new CostTracer; }

}  // namespace
}  // namespace emulator

// -fsanitize-coverage=trace-pc calls this function at each basic block.
extern "C" void __sanitizer_cov_trace_pc() {
  emulator::cost_tracer->basic_block(__builtin_return_address(0));
}
