// The host's side of a kernel launch: device, stream, and the one place with <<<>>>.
//
// The tests that run kernels on the CPU (tests/emulation) bring their own versions and define this
// guard.
#ifndef RETINANET_LAUNCH_H
#define RETINANET_LAUNCH_H

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

namespace retinanet {

// Makes the tensor's device current for a scope and names its current stream.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& t) : guard_(t.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Launches kernel(arguments...) on the scope's stream and checks the launch; `name` is for errors.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t shared_bytes, const CudaScope& scope, Arguments&&... arguments) {
  kernel<<<grid, block, shared_bytes, scope.stream()>>>(static_cast<Parameters>(arguments)...);
  const cudaError_t error = cudaGetLastError();
  check(error == cudaSuccess, "launch of ", name, " failed: ", cudaGetErrorString(error));
}

}  // namespace retinanet

#endif
