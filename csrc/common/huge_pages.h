// A hint that gives large new tensors large memory pages.
#pragma once

#include "tensor.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace retinanet {

// Asks for 2 MiB pages under a large tensor that is about to be written from end to end. Otherwise
// the page faults of the first access to each 4 KiB page cost more than computing the gradient of a
// loss. The hint has no effect if the system never uses huge pages, or always does.
inline void advise_huge_pages(Tensor& t) {
#ifdef __linux__
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const int64_t bytes = t.numel() * int64_t(t.element_size());
  if (bytes < 4 * int64_t(kPage)) return;
  // Advise only whole pages inside the tensor, because madvise takes page-aligned ranges.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + kPage - 1) & -kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(t.mutable_data_ptr()) + bytes) & -kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace retinanet
