// The race detector and the counters of memory traffic, for the variant `races`. Kernels are
// compiled with -fsanitize=thread, which makes them call a function at each access. These functions
// are defined here, in place of libtsan. This file is compiled without -fsanitize=thread.
//
// Two accesses race if they touch a common byte, at least one writes, not both are atomic, and no
// barrier orders them. __syncthreads orders the threads of a block, __syncwarp those of a warp.
// Nothing orders the blocks of a grid. Whether a race is found does not depend on the schedule,
// except that only the last write and the last two reading threads of a byte are remembered.
#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <set>
#include <unordered_map>
#include <utility>

#include "emulator.h"

namespace emulator {
namespace {

constexpr size_t kShadowBytes = 4;  // the most bytes that share one Shadow
constexpr size_t kPageBytes = 1024;
constexpr size_t kSectorBytes = 32;  // the least that a GPU moves between caches and memory
// A sector is evicted after this many more bytes have been fetched. This is about the size of a
// multiprocessor's L1 cache, and small enough to expose a second pass over a tensor.
constexpr int64_t kCacheBytes = 128 * 1024;
constexpr size_t kMaxPages = 20'000;  // pages_ is cleared before a launch if it has more
constexpr size_t kMaxRaces = 20;

struct Range {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t p) const { return p >= begin && p < end; }
};

struct Access {
  uint32_t block = 0, block_barriers = 0, warp_barriers = 0;
  uint32_t code = 0;  // offset in this library
  uint16_t thread = 0;
  bool happened = false;
  bool is_atomic = false;

  bool same_thread(const Access& other) const {
    return block == other.block && thread == other.thread;
  }
};

// The last accesses of neighbouring bytes that have only been accessed together.
struct Shadow {
  Access write, read, earlier_read;
};

// The shadows of a page of memory. A narrower access splits them, so that every access covers whole
// shadows.
struct Page {
  uint32_t launch = 0;
  size_t shadow_bytes = kShadowBytes;
  std::vector<Shadow> shadows;
  int64_t fetched_at[kPageBytes / kSectorBytes];  // bytes_fetched at that time; -1 if not fetched

  void begin_launch(uint32_t number) {
    launch = number;
    shadow_bytes = kShadowBytes;
    shadows.assign(kPageBytes / kShadowBytes, Shadow{});
    std::fill(std::begin(fetched_at), std::end(fetched_at), -1);
  }

  void split(size_t bytes) {
    std::vector<Shadow> parts(kPageBytes / bytes);
    for (size_t i = 0; i < parts.size(); ++i) parts[i] = shadows[i * bytes / shadow_bytes];
    shadows = std::move(parts);
    shadow_bytes = bytes;
  }

  Shadow& shadow(uintptr_t address) { return shadows[address % kPageBytes / shadow_bytes]; }
};

struct Race {
  std::string kernel, kind;
  const char* space;
  Access first, second;
  bool first_writes, second_writes;
};

class RaceTracer final : public Tracer {
 public:
  RaceTracer() {
    dl_iterate_phdr([](dl_phdr_info* info, size_t,
                       void* self) { return static_cast<RaceTracer*>(self)->find_module(*info); },
                    this);
  }

  void begin_launch(Launch& launch, const void* shared, size_t shared_bytes) override {
    launch_ = &launch;
    ++launch_number_;
    dynamic_shared_ = {uintptr_t(shared), uintptr_t(shared) + shared_bytes};
    os_stack_ = stack_of_this_thread();
    last_page_ = nullptr;
    if (pages_.size() > kMaxPages) pages_.clear();
  }

  void access(const void* address, size_t size, Kind kind, const void* code) override {
    // Skip accesses of host code, which calls these functions as well.
    if (current == nullptr || !is_thread_private(__builtin_frame_address(0))) return;
    const uintptr_t p = uintptr_t(address);
    // Skip the thread's own stack, and the host's stack, which holds the kernel's arguments.
    if (is_thread_private(address) || os_stack_.contains(p)) return;
    const bool shared = dynamic_shared_.contains(p) || statics_.contains(p);
    if (!shared && module_.contains(p)) return;  // constants
    Access me;
    me.happened = true;
    me.block = block.rank;
    me.thread = uint16_t(current->rank);
    me.block_barriers = current->block_barriers;
    me.warp_barriers = current->warp_barriers;
    me.is_atomic = kind == kAtomic;
    me.code = uint32_t(uintptr_t(code) - module_.begin);
    if (size == 16 && p % 16 != 0)
      violation("misaligned access of 16 bytes at " + source_line(me.code));
    if (!shared) count(p, size, kind);
    // The largest power of two, up to kShadowBytes, that divides both address and size.
    const size_t multiple = p | size | kShadowBytes, unit = multiple & -multiple;
    for (uintptr_t at = p; at < p + size;) {
      Page& its_page = page(at);
      if (its_page.shadow_bytes > unit) its_page.split(unit);
      check(its_page.shadow(at), me, kind, shared);
      at += its_page.shadow_bytes;
    }
  }

  std::vector<std::string> take_races() override {
    std::vector<std::string> lines;
    for (const Race& race : races_) {
      const std::string line =
          race.kind + " in " + race.space + " memory, kernel " + race.kernel + ": " +
          side(race.second, race.second_writes) +
          (race.first.happened ? "; " + side(race.first, race.first_writes) : "");
      // An unrolled loop has several copies of one line of code, which count once.
      if (std::find(lines.begin(), lines.end(), line) == lines.end()) lines.push_back(line);
    }
    races_.clear();
    seen_.clear();
    return lines;
  }

 private:
  // Finds the library that holds this code. Its writable segment holds the kernels' static shared
  // memory.
  int find_module(const dl_phdr_info& info) {
    bool mine = false;
    Range module, statics;
    module.begin = module.end = info.dlpi_addr;
    for (int i = 0; i < info.dlpi_phnum; ++i) {
      const auto& segment = info.dlpi_phdr[i];
      if (segment.p_type != PT_LOAD) continue;
      const Range range{info.dlpi_addr + segment.p_vaddr,
                        info.dlpi_addr + segment.p_vaddr + segment.p_memsz};
      module.end = std::max(module.end, range.end);
      mine = mine || range.contains(uintptr_t(&stack_of_this_thread));
      if (segment.p_flags & PF_W) statics = range;
    }
    if (!mine) return 0;
    module_ = module;
    statics_ = statics;
    return 1;
  }

  static Range stack_of_this_thread() {
    thread_local const Range range = [] {
      pthread_attr_t attributes;
      void* begin = nullptr;
      size_t size = 0;
      pthread_getattr_np(pthread_self(), &attributes);
      pthread_attr_getstack(&attributes, &begin, &size);
      pthread_attr_destroy(&attributes);
      return Range{uintptr_t(begin), uintptr_t(begin) + size};
    }();
    return range;
  }

  Page& page(uintptr_t address) {
    const uintptr_t key = address / kPageBytes;
    if (last_page_ == nullptr || key != last_key_) {
      last_page_ = &pages_[key];
      last_key_ = key;
      if (last_page_->launch != launch_number_) last_page_->begin_launch(launch_number_);
    }
    return *last_page_;
  }

  void count(uintptr_t p, size_t size, Kind kind) {
    Traffic& traffic = launch_->traffic;
    if (kind != kRead) {
      ++traffic.writes;
      traffic.wide_writes += size == 16;
      traffic.bytes_written += int64_t(size);
    }
    if (kind == kWrite) return;
    ++traffic.reads;
    traffic.wide_reads += size == 16;
    traffic.bytes_read += int64_t(size);
    for (uintptr_t s = p / kSectorBytes * kSectorBytes; s < p + size; s += kSectorBytes) {
      int64_t& at = page(s).fetched_at[s % kPageBytes / kSectorBytes];
      if (at < 0 || traffic.bytes_fetched - at > kCacheBytes) {
        traffic.bytes_fetched += kSectorBytes;
        at = traffic.bytes_fetched;
      }
    }
  }

  static bool ordered(const Access& earlier, const Access& later, bool shared) {
    if (!earlier.happened || earlier.same_thread(later)) return true;
    if (earlier.block != later.block) return shared;  // each block has its own shared memory
    if (earlier.block_barriers < later.block_barriers) return true;
    return earlier.thread / 32 == later.thread / 32 && earlier.warp_barriers < later.warp_barriers;
  }

  void check(Shadow& shadow, const Access& me, Kind kind, bool shared) {
    const auto compare = [&](const Access& other, const char* what, bool other_writes) {
      const bool both_atomic = other.is_atomic && me.is_atomic;
      if (!both_atomic && !ordered(other, me, shared))
        report(what, other, me, other_writes, kind != kRead, shared);
    };
    if (kind != kWrite && shared && (!shadow.write.happened || shadow.write.block != me.block))
      report("read of uninitialised", Access{}, me, true, kind != kRead, shared);
    if (kind == kRead) {
      compare(shadow.write, "read after write without a barrier", true);
      if (!shadow.read.same_thread(me)) shadow.earlier_read = shadow.read;
      shadow.read = me;
      return;
    }
    compare(shadow.write, "write after write without a barrier", true);
    compare(shadow.read, "write after read without a barrier", false);
    compare(shadow.earlier_read, "write after read without a barrier", false);
    shadow.write = me;
  }

  void report(const char* kind, const Access& first, const Access& second, bool first_writes,
              bool second_writes, bool shared) {
    if (races_.size() >= kMaxRaces || !seen_.insert({first.code, second.code}).second) return;
    races_.push_back({launch_->kernel, kind, shared ? "shared" : "global", first, second,
                      first_writes, second_writes});
  }

  std::string side(const Access& access, bool writes) {
    return std::string(writes ? "write" : "read") + " by block " + std::to_string(access.block) +
           ", thread " + std::to_string(access.thread) + " at " + source_line(access.code);
  }

  // Returns "file:line", followed by the lines into which the code was inlined.
  std::string source_line(uint32_t code) {
    std::string& known = source_lines_[code];
    if (!known.empty()) return known;
    Dl_info library;
    if (dladdr(reinterpret_cast<void*>(&stack_of_this_thread), &library) == 0) return "?";
    char command[4096], line[1024];
    std::snprintf(command, sizeof command, "addr2line -i -s -e '%s' 0x%x 2>/dev/null",
                  library.dli_fname, code - 1);
    std::string lines;
    if (FILE* pipe = popen(command, "r")) {
      while (std::fgets(line, sizeof line, pipe)) {
        line[std::strcspn(line, " \n")] = 0;  // drops "(discriminator 2)"
        lines += (lines.empty() ? "" : " < ") + std::string(line);
      }
      pclose(pipe);
    }
    return known = lines.empty() ? "?" : lines;
  }

  Range module_, statics_, dynamic_shared_, os_stack_;
  std::unordered_map<uintptr_t, Page> pages_;
  uintptr_t last_key_ = 0;
  Page* last_page_ = nullptr;
  Launch* launch_ = nullptr;
  uint32_t launch_number_ = 0;
  std::unordered_map<uint32_t, std::string> source_lines_;
  std::vector<Race> races_;
  std::set<std::pair<uint32_t, uint32_t>> seen_;
};

// Runs before the constructors of the files that are compiled with -fsanitize=thread.
__attribute__((constructor(101))) void install() { tracer = new RaceTracer; }

}  // namespace

}  // namespace emulator

// ---- Functions that -fsanitize=thread calls ----------------------------------------------------

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
