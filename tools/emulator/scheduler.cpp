// Runs blocks and threads, barriers and collectives. Compiled without -fsanitize=thread in every
// variant.
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <utility>

#include "dynamic_shared.h"
#include "emulator.h"
#include "fiber.h"
#include "schedule.h"

namespace emulator {

Thread* current = nullptr;
Block block;
Settings settings;
std::vector<Launch> launches;
Tracer* tracer = nullptr;

namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackSize = 256 * 1024;
constexpr size_t kMaxShared = 48 * 1024;  // the limit without cudaFuncSetAttribute

std::string coordinates(const uint3& v) {
  std::ostringstream s;
  s << '(' << v.x << ", " << v.y << ", " << v.z << ')';
  return s.str();
}

std::string size_text(const dim3& v) {
  std::ostringstream s;
  s << v.x << " x " << v.y << " x " << v.z;
  return s.str();
}

std::string hex(unsigned mask) {
  std::ostringstream s;
  s << "0x" << std::hex << mask;
  return s.str();
}

bool same_line(const Location& a, const Location& b) {
  return a.line() == b.line() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

struct Warp {
  unsigned lanes = 0, alive = 0;   // masks: lanes that exist, lanes that have not returned
  std::vector<Meeting*> meetings;  // collectives that wait for lanes
};

void run_threads();

struct Machine {
  FiberPool fibers{kMaxThreads, kStackSize, &run_threads};
  Fiber os_thread;
  Fiber* running = &os_thread;
  ReadyQueue ready;
  std::vector<Thread> threads;
  Warp warps[kMaxThreads / kWarp];
  std::vector<std::unique_ptr<Meeting>> all_meetings;
  std::vector<Meeting*> free_meetings;
  unsigned alive = 0;                  // threads that have not returned
  unsigned arrived = 0, in_favor = 0;  // threads at the barrier, those whose predicate is true
  unsigned barrier_result = 0;
  Location barrier;  // the barrier at which the arrived threads wait
  const char* kernel = "";
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  std::string failure;
};

// Created at the first use and never destroyed, because fibers may outlive main().
Machine& machine() {
  static Machine& instance = *new Machine;
  return instance;
}

void resume(Fiber* fiber) {
  Machine& m = machine();
  Fiber* from = m.running;
  if (from == fiber) return;
  m.running = fiber;
  switch_fiber(*from, *fiber);
}

[[noreturn]] void deadlock() {
  for (Thread& t : machine().threads) {
    if (t.state != Thread::kAtBarrier && t.state != Thread::kInCollective) continue;
    current = &t;
    violation("deadlock: a thread waits at " + describe(t.where) +
              ", and the threads that it waits for have returned or wait elsewhere");
  }
  violation("deadlock");
}

// Runs other threads until the schedule chooses this one. This thread must be in the ready queue,
// or another thread must put it there.
void suspend() {
  Machine& m = machine();
  Thread* me = current;
  Thread* next = m.ready.pop();
  if (next == nullptr) deadlock();
  if (next == me) return;
  if (next->state == Thread::kFresh) next->fiber = m.fibers.take();
  current = next;
  resume(next->fiber);
  current = me;
}

void open_barrier() {
  Machine& m = machine();
  m.barrier_result = m.in_favor;
  if (tracer != nullptr) tracer->barrier_opens();
  m.arrived = m.in_favor = 0;
  for (Thread& t : m.threads) {
    if (t.state != Thread::kAtBarrier) continue;
    t.state = Thread::kReady;
    ++t.block_barriers;
    m.ready.push(&t);
  }
}

// Releases the lanes of a collective if every lane that it waits for has arrived.
void try_to_complete(Warp& warp, unsigned first_thread, Meeting* meeting) {
  Machine& m = machine();
  const unsigned missing = meeting->mask & warp.lanes & ~meeting->arrived;
  if (missing & warp.alive) return;
  if (settings.strict && missing != 0)
    violation(std::string(meeting->name) + " at " + describe(meeting->where) + " with mask " +
              hex(meeting->mask) + ", but lanes " + hex(missing) + " returned without it");
  warp.meetings.erase(std::find(warp.meetings.begin(), warp.meetings.end(), meeting));
  meeting->still_inside = unsigned(__builtin_popcount(meeting->arrived));
  // Only __syncwarp orders memory. The race detector cannot express the order that a __syncwarp of
  // a part of the warp establishes, so such a __syncwarp counts as none.
  const bool orders_memory =
      (warp.alive & ~meeting->arrived) == 0 && std::strcmp(meeting->name, "__syncwarp") == 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    if (!(meeting->arrived >> lane & 1)) continue;
    Thread& t = m.threads[first_thread + lane];
    if (orders_memory) ++t.warp_barriers;
    if (t.state != Thread::kInCollective) continue;
    t.state = Thread::kReady;
    m.ready.push(&t);
  }
}

void thread_returned(Thread& t) {
  Machine& m = machine();
  Warp& warp = m.warps[t.warp];
  t.state = Thread::kReturned;
  --m.alive;
  warp.alive &= ~(1u << t.lane);
  // As in CUDA, collectives do not wait for a thread that has returned. Strict checks report it.
  const std::vector<Meeting*> waiting = warp.meetings;
  for (Meeting* meeting : waiting) try_to_complete(warp, t.warp * kWarp, meeting);
  if (m.arrived == 0) return;
  if (settings.strict)
    violation("a thread returned while others wait in __syncthreads at " + describe(m.barrier));
  if (m.arrived == m.alive) open_barrier();
}

// The entry point of a fiber, which runs one thread after another.
void run_threads() {
  entered_fiber();
  Machine& m = machine();
  for (;;) {
    current->state = Thread::kReady;
    m.body(m.argument);
    thread_returned(*current);
    Thread* next = m.ready.pop();
    if (next != nullptr && next->state == Thread::kFresh) {
      // The next thread starts on this fiber, so a kernel without barriers never switches fibers.
      next->fiber = m.running;
      current = next;
      continue;
    }
    if (next == nullptr && m.alive > 0) deadlock();
    m.fibers.give_back(m.running);
    current = next;
    resume(next != nullptr ? next->fiber : &m.os_thread);
    // The next resume() of this fiber starts the thread that is `current` at that time.
  }
}

void run_block(size_t rank) {
  Machine& m = machine();
  const dim3 size = block.size, grid = block.grid;
  block.rank = unsigned(rank);
  block.index = {unsigned(rank % grid.x), unsigned(rank / grid.x % grid.y),
                 unsigned(rank / (size_t(grid.x) * grid.y))};
  m.alive = unsigned(m.threads.size());
  m.arrived = m.in_favor = 0;
  m.ready.clear();
  for (Warp& warp : m.warps) warp.lanes = 0;
  for (unsigned i = 0; i < m.threads.size(); ++i) {
    Thread& t = m.threads[i];
    t = Thread{};
    t.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    t.rank = i;
    t.lane = i % kWarp;
    t.warp = i / kWarp;
    m.warps[t.warp].lanes |= 1u << t.lane;
    m.ready.push(&t);
  }
  for (Warp& warp : m.warps) warp.alive = warp.lanes;
  if (tracer != nullptr) tracer->begin_block(unsigned(m.threads.size()));
  Thread* first = m.ready.pop();
  first->fiber = m.fibers.take();
  current = first;
  resume(first->fiber);
  current = nullptr;
  if (tracer != nullptr) tracer->end_block();
}

// Discards the threads of a failed launch and throws its error.
[[noreturn]] void fail() {
  Machine& m = machine();
  m.fibers.abandon_all();
  m.running = &m.os_thread;
  for (Warp& warp : m.warps) warp.meetings.clear();
  m.free_meetings.clear();
  for (const auto& meeting : m.all_meetings) m.free_meetings.push_back(meeting.get());
  throw std::runtime_error(std::exchange(m.failure, {}));
}

void check_launch(const char* kernel, dim3 grid, dim3 size, size_t shared_bytes) {
  const auto refuse = [&](const std::string& what) {
    throw std::runtime_error(std::string("launch of ") + kernel + ": " + what);
  };
  const size_t threads = size_t(size.x) * size.y * size.z;
  if (current != nullptr) violation("a kernel launches another one");
  if (threads == 0 || threads > kMaxThreads || size.z > 64)
    refuse("a block of " + size_text(size) + " threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    refuse("a grid of " + size_text(grid) + " blocks");
  // A device also counts static shared memory, whose size is unknown here.
  if (shared_bytes > kMaxShared)
    refuse(std::to_string(shared_bytes) + " bytes of dynamic shared memory, at most " +
           std::to_string(kMaxShared));
}

}  // namespace

bool Sample::contains(uint32_t rank, const dim3& grid) const {
  if (first_images > 0) {
    const bool in_y = grid.y == images, in_x = !in_y && grid.x == images;
    const unsigned image = in_y ? rank / grid.x % grid.y : in_x ? rank % grid.x : 0;
    if (image >= first_images) return false;
  }
  const size_t step = blocks > 0 ? size_t(grid.x) * grid.y * grid.z / blocks : 1;
  return step <= 1 || rank % step == step / 2;
}

std::string describe(const Location& where) {
  const char* slash = std::strrchr(where.file_name(), '/');
  return (slash ? slash + 1 : where.file_name()) + (":" + std::to_string(where.line()));
}

bool is_thread_private(const void* address) { return machine().fibers.contains(address); }

void violation(const std::string& what) {
  Machine& m = machine();
  if (current == nullptr) throw std::runtime_error(what + ", outside any kernel");
  m.failure = what + " [kernel " + m.kernel + ", block " + coordinates(block.index) + ", thread " +
              coordinates(current->index) + "]";
  current = nullptr;
  resume(&m.os_thread);  // never returns, because launch() abandons this fiber
  std::abort();
}

unsigned sync_threads(bool predicate, const Location& where) {
  Machine& m = machine();
  if (current == nullptr) violation("__syncthreads at " + describe(where));
  if (settings.strict) {
    if (m.alive != m.threads.size())
      violation("__syncthreads at " + describe(where) + " after " +
                std::to_string(m.threads.size() - m.alive) + " thread(s) of the block returned");
    if (m.arrived > 0 && !same_line(m.barrier, where))
      violation("divergent __syncthreads: here at " + describe(where) + ", other threads at " +
                describe(m.barrier));
  }
  m.barrier = current->where = where;
  m.in_favor += predicate;
  current->state = Thread::kAtBarrier;
  if (++m.arrived == m.alive) open_barrier();
  suspend();
  return m.barrier_result;
}

Meeting* arrive(unsigned mask, const char* name, const Location& where) {
  Machine& m = machine();
  if (current == nullptr) violation(std::string(name) + " at " + describe(where));
  const auto here = [&] { return std::string(name) + " at " + describe(where); };
  const unsigned lane = 1u << current->lane;
  if (!(mask & lane))
    violation(here() + " with mask " + hex(mask) + ", which leaves out the calling lane " +
              std::to_string(current->lane));
  std::vector<Meeting*>& meetings = m.warps[current->warp].meetings;
  Meeting* meeting = nullptr;
  for (Meeting* other : meetings)
    if (other->mask == mask && !(other->arrived & lane)) meeting = other;
  if (meeting == nullptr) {
    if (m.free_meetings.empty()) {
      m.all_meetings.push_back(std::make_unique<Meeting>());
      m.free_meetings.push_back(m.all_meetings.back().get());
    }
    meeting = m.free_meetings.back();
    m.free_meetings.pop_back();
    meeting->mask = mask;
    meeting->arrived = 0;
    meeting->name = name;
    meeting->where = where;
    meeting->folded = 0;
    meetings.push_back(meeting);
  } else if (std::strcmp(meeting->name, name) != 0 ||
             (settings.strict && !same_line(meeting->where, where))) {
    violation(here() + ", where other lanes of the warp are in " + meeting->name + " at " +
              describe(meeting->where));
  }
  meeting->arrived |= lane;
  if (tracer != nullptr) tracer->collective();
  current->where = where;
  current->state = Thread::kInCollective;
  return meeting;
}

void wait(Meeting* meeting) {
  try_to_complete(machine().warps[current->warp], current->warp * kWarp, meeting);
  suspend();
}

void leave(Meeting* meeting) {
  if (--meeting->still_inside == 0) machine().free_meetings.push_back(meeting);
}

void yield() {
  current->state = Thread::kReady;
  machine().ready.push(current);
  suspend();
}

void launch(const char* kernel, const void* function, dim3 grid, dim3 size, size_t shared_bytes,
            void (*body)(void*), void* argument) {
  check_launch(kernel, grid, size, shared_bytes);
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Machine& m = machine();
  m.threads.resize(size_t(size.x) * size.y * size.z);
  m.kernel = kernel;
  m.body = body;
  m.argument = argument;
  DynamicShared shared(shared_bytes);
  block.size = size;
  block.grid = grid;
  block.dynamic_shared = shared.get();
  Dl_info library;
  const bool found = dladdr(function, &library) != 0;
  const uintptr_t offset = uintptr_t(function) - (found ? uintptr_t(library.dli_fbase) : 0);
  launches.push_back({kernel, offset, grid, size, shared_bytes, {}, {}});
  if (tracer != nullptr) tracer->begin_launch(launches.back(), shared.get(), shared_bytes);
  for (const uint32_t rank : block_order(size_t(grid.x) * grid.y * grid.z)) {
    if (!settings.sample.contains(rank, grid)) continue;
    shared.forget();
    run_block(rank);
    if (!m.failure.empty()) fail();
  }
}

}  // namespace emulator
