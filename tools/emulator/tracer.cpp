// The race detector and the counters of memory traffic, for the variant `races`. Kernels are
// compiled with -fsanitize=thread, which makes them call a function of tsan_hooks.cpp at each
// access. This file is compiled without -fsanitize=thread.
//
// Two accesses race if they touch a common byte, at least one writes, not both are atomic, and
// nothing orders them. __syncthreads orders the threads of a block, __syncwarp those of a warp.
// Fences with atomic operations order the blocks of a grid (handovers.h). Whether a race is found
// does not depend on the schedule, except that only the last write and the last two reading threads
// of a byte are remembered.
#include <algorithm>
#include <cstdio>
#include <cstring>
#include <set>
#include <unordered_map>
#include <utility>

#include "emulator.h"
#include "handovers.h"
#include "memory_map.h"
#include "traffic_counter.h"

namespace emulator {
namespace {

constexpr size_t kShadowBytes = 4;  // the most bytes that share one Shadow
constexpr size_t kPageBytes = 1024;
constexpr size_t kMaxPages = 20'000;  // pages_ is cleared before a launch if it has more
constexpr size_t kMaxRaces = 20;

struct Access : Position {
  bool happened = false;
  bool is_atomic = false;
  uint32_t code = 0;  // offset in this library
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

  void begin_launch(uint32_t number) {
    launch = number;
    shadow_bytes = kShadowBytes;
    shadows.assign(kPageBytes / kShadowBytes, Shadow{});
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
  void begin_launch(Launch& launch, const void* shared, size_t shared_bytes) override {
    launch_ = &launch;
    ++launch_number_;
    memory_.begin_launch(shared, shared_bytes);
    traffic_.begin_launch(launch.traffic);
    last_page_ = nullptr;
    if (pages_.size() > kMaxPages) pages_.clear();
    handovers_.begin_launch();
  }

  void fence() override {
    if (current == nullptr) return;
    ++current->fences;
    handovers_.fence(position());
  }

  void access(const void* address, size_t size, Kind kind, const void* code) override {
    // Skip accesses of host code, which calls these functions as well.
    if (current == nullptr || !is_thread_private(__builtin_frame_address(0))) return;
    const uintptr_t p = uintptr_t(address);
    const MemoryMap::Space space = memory_.space(p);
    if (space == MemoryMap::kOther) return;
    const bool shared = space == MemoryMap::kShared;
    const Access me{position(), true, kind == kAtomic,
                    uint32_t(uintptr_t(code) - memory_.module().begin)};
    if (size == 16 && p % 16 != 0)
      violation("misaligned access of 16 bytes at " + source_line(me.code));
    if (!shared) traffic_.count(p, size, kind);
    // The largest power of two, up to kShadowBytes, that divides both address and size.
    const size_t multiple = p | size | kShadowBytes, unit = multiple & -multiple;
    for (uintptr_t at = p; at < p + size;) {
      Page& its_page = page(at);
      if (its_page.shadow_bytes > unit) its_page.split(unit);
      check(its_page.shadow(at), me, kind, shared);
      at += its_page.shadow_bytes;
    }
    if (kind == kAtomic && !shared) handovers_.atomic(me, p);
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
  Page& page(uintptr_t address) {
    const uintptr_t key = address / kPageBytes;
    if (last_page_ == nullptr || key != last_key_) {
      last_page_ = &pages_[key];
      last_key_ = key;
      if (last_page_->launch != launch_number_) last_page_->begin_launch(launch_number_);
    }
    return *last_page_;
  }

  static Position position() {
    return {block.rank, current->block_barriers, current->warp_barriers, current->fences,
            uint16_t(current->rank)};
  }

  bool ordered(const Access& earlier, const Access& later, bool shared) const {
    if (!earlier.happened || earlier.same_thread(later)) return true;
    if (earlier.block == later.block && barrier_between(earlier, later)) return true;
    if (shared) return earlier.block != later.block;  // each block has its own shared memory
    // A pair of lines that has been reported is not examined again.
    return seen_.count({earlier.code, later.code}) > 0 || handovers_.ordered(earlier, later);
  }

  void check(Shadow& shadow, const Access& me, Kind kind, bool shared) {
    const auto compare = [&](const Access& other, const std::string& what, bool other_writes) {
      if ((other.is_atomic && me.is_atomic) || ordered(other, me, shared)) return;
      const char* missing = " without a barrier";
      if (other.block != me.block)
        missing = " of another block without a handover (fence, atomic, atomic, fence)";
      report(what + missing, other, me, other_writes, kind != kRead, shared);
    };
    if (kind != kWrite && shared && (!shadow.write.happened || shadow.write.block != me.block))
      report("read of uninitialised", Access{}, me, true, kind != kRead, shared);
    if (kind == kRead) {
      compare(shadow.write, "read after write", true);
      if (!shadow.read.same_thread(me)) shadow.earlier_read = shadow.read;
      shadow.read = me;
      return;
    }
    compare(shadow.write, "write after write", true);
    compare(shadow.read, "write after read", false);
    compare(shadow.earlier_read, "write after read", false);
    shadow.write = me;
  }

  void report(const std::string& kind, const Access& first, const Access& second, bool first_writes,
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
    const std::string library = MemoryMap::library_path();
    if (library.empty()) return "?";
    char command[4096], line[1024];
    std::snprintf(command, sizeof command, "addr2line -i -s -e '%s' 0x%x 2>/dev/null",
                  library.c_str(), code - 1);
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

  MemoryMap memory_;
  TrafficCounter traffic_;
  std::unordered_map<uintptr_t, Page> pages_;
  uintptr_t last_key_ = 0;
  Page* last_page_ = nullptr;
  Launch* launch_ = nullptr;
  uint32_t launch_number_ = 0;
  std::unordered_map<uint32_t, std::string> source_lines_;
  std::vector<Race> races_;
  std::set<std::pair<uint32_t, uint32_t>> seen_;
  Handovers handovers_;
};

// Runs before the constructors of the files that are compiled with -fsanitize=thread.
__attribute__((constructor(101))) void install() { tracer = new RaceTracer; }

}  // namespace

}  // namespace emulator
