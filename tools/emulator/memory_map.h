// Tells apart the memory spaces of an emulated kernel by address, for the tracers.
#pragma once

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "emulator.h"

namespace emulator {

struct AddressRange {
  uintptr_t begin = 0, end = 0;
  bool contains(uintptr_t p) const { return p >= begin && p < end; }
};

class MemoryMap {
 public:
  // kOther: a thread's own stack, the host's stack, which holds the kernel's arguments, constants.
  enum Space { kGlobal, kShared, kOther };

  MemoryMap() {
    dl_iterate_phdr([](dl_phdr_info* info, size_t,
                       void* self) { return static_cast<MemoryMap*>(self)->find_module(*info); },
                    this);
  }

  void begin_launch(const void* dynamic_shared, size_t shared_bytes) {
    dynamic_shared_ = {uintptr_t(dynamic_shared), uintptr_t(dynamic_shared) + shared_bytes};
    host_stack_ = stack_of_this_thread();
  }

  Space space(uintptr_t p) const {
    if (is_thread_private(reinterpret_cast<void*>(p)) || host_stack_.contains(p)) return kOther;
    if (dynamic_shared_.contains(p) || statics_.contains(p)) return kShared;
    return module_.contains(p) ? kOther : kGlobal;
  }

  // The library that holds this code.
  const AddressRange& module() const { return module_; }
  static std::string library_path() {
    Dl_info library;
    const bool found = dladdr(reinterpret_cast<void*>(&stack_of_this_thread), &library) != 0;
    return found ? library.dli_fname : "";
  }

 private:
  // The writable segment of this library holds the kernels' static shared memory.
  int find_module(const dl_phdr_info& info) {
    bool mine = false;
    AddressRange module, statics;
    module.begin = module.end = info.dlpi_addr;
    for (int i = 0; i < info.dlpi_phnum; ++i) {
      const auto& segment = info.dlpi_phdr[i];
      if (segment.p_type != PT_LOAD) continue;
      const AddressRange range{info.dlpi_addr + segment.p_vaddr,
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

  static AddressRange stack_of_this_thread() {
    thread_local const AddressRange range = [] {
      pthread_attr_t attributes;
      void* begin = nullptr;
      size_t size = 0;
      pthread_getattr_np(pthread_self(), &attributes);
      pthread_attr_getstack(&attributes, &begin, &size);
      pthread_attr_destroy(&attributes);
      return AddressRange{uintptr_t(begin), uintptr_t(begin) + size};
    }();
    return range;
  }

  AddressRange module_, statics_, dynamic_shared_, host_stack_;
};

}  // namespace emulator
