// The name of the instruction set that vectorised code uses, for the diagnosis that
// `python -m retinanet_ops` prints.
#include "simd.h"

extern "C" __attribute__((visibility("default"))) const char* retinanet_ops_cpu_capability() {
  switch (retinanet::isa()) {
    case retinanet::Isa::kAvx512:
      return "avx512";
    case retinanet::Isa::kAvx2:
      return "avx2";
    default:
      return "default";
  }
}
