// The host side of a kernel launch: device, stream, and the only <<<>>> in the project.
//
// The emulator (tools/emulator/ops_shim.h) replaces this file: it defines the include guard below
// and its own CudaScope and launch.
#ifndef RETINANET_LAUNCH_H
#define RETINANET_LAUNCH_H

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace retinanet {

inline void check_device(const Tensor& t, int32_t device, const char* op) {
  check(t.is_cuda() && t.get_device_index() == device, op,
        ": expected every tensor on CUDA device ", device, ", got one of shape ", shape(t),
        " on another device");
}

inline void check_device(const std::optional<Tensor>& t, int32_t device, const char* op) {
  if (t) check_device(*t, device, op);
}

inline void check_device(const std::vector<Tensor>& tensors, int32_t device, const char* op) {
  for (const Tensor& t : tensors) check_device(t, device, op);
}

// Makes the first tensor's device current for the lifetime of the object, and holds the stream that
// is current on that device. All other tensors of the op must be on the same device.
class CudaScope {
 public:
  template <typename... Others>
  explicit CudaScope(const char* op, const Tensor& t, const Others&... others)
      : guard_(t.get_device_index()) {
    (check_device(others, t.get_device_index(), op), ...);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Launches kernel(arguments...) on the scope's stream and checks that the launch succeeded. `name`
// is the kernel's name in the error message.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, const CudaScope& scope, Arguments&&... arguments) {
  kernel<<<grid, block, shared_bytes, scope.stream()>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "launch of ", name, " failed: ", cudaGetErrorString(error));
}

}  // namespace retinanet

#endif
