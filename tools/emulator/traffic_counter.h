// Counts what a launch reads from and writes to global memory, for the tracers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <unordered_map>

#include "emulator.h"

namespace emulator {

class TrafficCounter {
 public:
  // The furthest cache or memory from which a read fetched a sector. L1 belongs to one block, L2 to
  // all.
  enum Source { kL1, kL2, kMemory };

  void begin_launch(Traffic& traffic) {
    traffic_ = &traffic;
    ++launch_;
    last_page_ = nullptr;
    if (pages_.size() > kMaxPages) pages_.clear();
  }

  Source count(uintptr_t p, size_t size, Tracer::Kind kind) {
    if (kind != Tracer::kRead) {
      ++traffic_->writes;
      traffic_->wide_writes += size == 16;
      traffic_->bytes_written += int64_t(size);
    }
    if (kind == Tracer::kWrite) return kL1;
    ++traffic_->reads;
    traffic_->wide_reads += size == 16;
    traffic_->bytes_read += int64_t(size);
    Source source = kL1;
    for (uintptr_t s = p / kSectorBytes * kSectorBytes; s < p + size; s += kSectorBytes)
      source = std::max(source, fetch(sector(s)));
    return source;
  }

 private:
  // The least that a GPU moves between caches and memory.
  static constexpr size_t kSectorBytes = 32;
  // A sector is evicted after this many more bytes have been fetched. This is about the size of a
  // multiprocessor's L1 cache, and small enough to expose a second pass over a tensor.
  static constexpr int64_t kCacheBytes = 128 * 1024;
  static constexpr size_t kPageBytes = 1024;
  static constexpr size_t kMaxPages = 400'000;  // pages_ is cleared before a launch if it has more

  struct Sector {
    int64_t fetched_at = -1;  // bytes_fetched at that time; -1 if not fetched
    uint32_t block = 0;       // the last block that read it
  };
  struct Page {
    uint32_t launch = 0;
    Sector sectors[kPageBytes / kSectorBytes];
  };

  Source fetch(Sector& sector) {
    Source source = sector.block == block.rank ? kL1 : kL2;
    sector.block = block.rank;
    const bool missing = sector.fetched_at < 0;
    if (missing || traffic_->bytes_fetched - sector.fetched_at > kCacheBytes) {
      source = missing ? kMemory : kL2;
      traffic_->bytes_fetched += kSectorBytes;
      sector.fetched_at = traffic_->bytes_fetched;
    }
    return source;
  }

  Sector& sector(uintptr_t address) {
    const uintptr_t key = address / kPageBytes;
    if (last_page_ == nullptr || key != last_key_) {
      last_page_ = &pages_[key];
      last_key_ = key;
      if (last_page_->launch != launch_) {
        last_page_->launch = launch_;
        std::fill(std::begin(last_page_->sectors), std::end(last_page_->sectors), Sector{});
      }
    }
    return last_page_->sectors[address % kPageBytes / kSectorBytes];
  }

  Traffic* traffic_ = nullptr;
  uint32_t launch_ = 0;
  std::unordered_map<uintptr_t, Page> pages_;
  uintptr_t last_key_ = 0;
  Page* last_page_ = nullptr;
};

}  // namespace emulator
