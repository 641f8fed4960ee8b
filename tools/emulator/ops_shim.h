// Force-included before each csrc/*_cuda.cu. Puts the emulator in place of csrc/common/launch.h and
// registers the kernels for CPU tensors.
#pragma once

#include <utility>

#include "common/tensor.h"
#include "cuda_shim.h"

#define RETINANET_LAUNCH_H

namespace retinanet {

// CPU tensors have neither a current device nor a stream.
class CudaScope {
 public:
  template <typename... Others>
  explicit CudaScope(const char*, const Tensor&, const Others&...) {}
};

template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, const CudaScope&, Arguments&&... arguments) {
  emulator::launch_kernel(name, kernel, grid, block, shared_bytes,
                          std::forward<Arguments>(arguments)...);
}

}  // namespace retinanet

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m) _STABLE_TORCH_LIBRARY_IMPL(ns, CPU, m, C10_UID)
