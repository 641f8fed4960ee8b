// Pairwise IoU and its relatives on CUDA.
//
//                     boxes2, one thread each
//                     0 ....... 127   128 ..... 255   ...
//                    +-------------+---------------+---
//   boxes1   0 .. 31 | block (0,0) |  block (1,0)  |       a tile: kRows x kThreads results
//                    +-------------+---------------+---
//           32 .. 63 | block (0,1) |  block (1,1)  |
//                    +-------------+---------------+---
//
// Work: a thread keeps its box of boxes2 in registers and walks down the rows of a tile, whose
// boxes are in shared memory. A warp therefore writes 32 neighbouring results. If the results have
// more than kTiles tiles in a column, a block continues with the tile kTiles further down. Bytes
// moved per pair: 4 written. Deterministic: one thread computes a result, in a fixed order.
#include "box_iou.h"
#include "common/cuda.h"

namespace retinanet {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 32;     // rows of a tile
constexpr int kTiles = 1024;  // most blocks in a column of tiles (gridDim.y)

// 128-bit accesses: 1 load, 0 stores
// 128-bit loops: loads
template <typename T, IouKind kKind>
__global__ void __launch_bounds__(kThreads)
    box_iou_kernel(const Box<T>* __restrict__ boxes1, const Box<T>* __restrict__ boxes2,
                   int64_t rows, int64_t columns, T* __restrict__ out) {
  __shared__ Box<T> box[kRows];
  __shared__ T areas[kRows];
  // This thread's column and its box. Threads beyond the last column only help to load tiles.
  const int64_t j = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const Box<T> mine = j < columns ? boxes2[j] : Box<T>{0, 0, 0, 0};
  const T my_area = area(mine);
  for (int64_t first = int64_t(blockIdx.y) * kRows; first < rows;
       first += int64_t(gridDim.y) * kRows) {
    const int size = int(rows - first < kRows ? rows - first : kRows);
    // Load the boxes of the rows. Other threads may still be reading those of the previous tile.
    __syncthreads();
    if (threadIdx.x < size) {
      box[threadIdx.x] = boxes1[first + threadIdx.x];
      areas[threadIdx.x] = area(box[threadIdx.x]);
    }
    __syncthreads();
    // Walk down the rows of the tile, and write one result for each.
    for (int i = 0; i < size && j < columns; ++i)
      out[(first + i) * columns + j] = iou_like<kKind>(box[i], areas[i], mine, my_area);
  }
}

Tensor box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2, std::string kind) {
  check_box_iou(boxes1, boxes2);
  const CudaScope scope("box_iou", boxes1, boxes2);
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  const int64_t rows = a.size(0), columns = b.size(0);
  Tensor out = torch::stable::new_empty(a, {rows, columns});
  if (rows == 0 || columns == 0) return out;
  dispatch_compute(a.scalar_type(), "box_iou", [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(unsigned(ceil_div(columns, kThreads)),
                    unsigned(std::min<int64_t>(ceil_div(rows, kRows), kTiles)));
    dispatch_iou_kind(kind, [&](auto kind_constant) {
      launch("box_iou_kernel", box_iou_kernel<T, decltype(kind_constant)::value>, grid, kThreads, 0,
             scope, data<Box<T>>(a), data<Box<T>>(b), rows, columns, data<T>(out));
    });
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) { m.impl("box_iou", TORCH_BOX(&box_iou_cuda)); }

}  // namespace retinanet
