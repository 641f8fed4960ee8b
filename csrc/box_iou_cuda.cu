// Pairwise IoU and its relatives on CUDA, and their gradients.
//
// The forward kernel:
//
//                     boxes2, a pack of results for each thread
//                     0 ....... 511   512 .... 1023   ...     (float32; half as many in float64)
//                    +-------------+---------------+---
//   boxes1   0 .. 63 | block (0,0) |  block (1,0)  |       a tile: kRows x kTileColumns results
//                    +-------------+---------------+---
//          64 .. 127 | block (0,1) |  block (1,1)  |
//                    +-------------+---------------+---
//
// Work: a thread keeps the boxes2 of its columns in registers and walks down the rows of a tile,
// whose boxes are in shared memory. If rows of results start at multiples of 16 bytes, its columns
// are neighbours, and it writes a row's results with one 128-bit store:
//
//   columns of thread 0     0 1 2 3                       of a tile; thread 1 has 4 5 6 7
//
// Otherwise they are one block apart, so that a warp still writes neighbouring results:
//
//   columns of thread 0     0   128   256   384           thread 1 has 1 129 257 385
//
// If the results have more than kTiles tiles in a column, a block continues with the tile kTiles
// further down. Bytes moved per pair: 4 written. Deterministic: one thread computes a result, in a
// fixed order.
//
// The backward kernel: a warp takes one box of boxes1 and a tile of boxes2, which its lanes visit
// in turn. It adds the derivatives of its pairs. Few rows are split into several tiles, so that
// kBackwardWarps warps have work. Their sums are partial sums, which a second kernel adds. Bytes
// moved per pair: 4 read. Deterministic: the tiles depend on the shape only, and all sums have a
// fixed order.
#include "box_iou.h"
#include "common/cuda.h"
#include "common/partial_sums.h"

namespace retinanet {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;     // rows of a tile
constexpr int kTiles = 1024;  // most blocks in a column of tiles (gridDim.y)

constexpr int kBackwardWarps = 8192;  // least number of warps, if there are enough columns
constexpr int kLeastColumns = 256;    // least number of columns of a tile of the backward kernel

// The IoU of two boxes, or a relative of it: the bits of iou_like(), without a division for boxes
// that do not overlap.
template <IouKind kKind, typename T>
__device__ __forceinline__ T pair_iou(const Box<T>& a, T a_area, const Box<T>& b, T b_area) {
  if constexpr (kKind == IouKind::kIou)
    return iou_if_overlapping(a, a_area, b, b_area);
  else
    return iou_like<kKind>(a, a_area, b, b_area);
}

// 128-bit accesses: 1 load, 1 store
// 128-bit loops: loads
template <typename T, IouKind kKind>
__global__ void __launch_bounds__(kThreads)
    box_iou_kernel(const Box<T>* __restrict__ boxes1, const Box<T>* __restrict__ boxes2,
                   int64_t rows, int64_t columns, T* __restrict__ out) {
  constexpr int kColumns = Packed<T>::kSize, kTileColumns = kColumns * kThreads;
  __shared__ Box<T> box[kRows];
  __shared__ T areas[kRows];
  // This thread's columns and their boxes. Threads beyond the last column only help to load tiles.
  const bool packed = columns % kColumns == 0;
  const int step = packed ? 1 : kThreads;
  const int64_t j =
      int64_t(blockIdx.x) * kTileColumns + int64_t(threadIdx.x) * (packed ? kColumns : 1);
  Box<T> mine[kColumns];
  T my_area[kColumns];
#pragma unroll
  for (int k = 0; k < kColumns; ++k) {
    mine[k] = j + k * step < columns ? boxes2[j + k * step] : Box<T>{0, 0, 0, 0};
    my_area[k] = area(mine[k]);
  }
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
    // Walk down the rows of the tile, and write the results of each.
    T* row = out + first * columns + j;
    for (int i = 0; i < size && j < columns; ++i, row += columns) {
      const Box<T> row_box = box[i];
      const T row_area = areas[i];
      Packed<T> results;
#pragma unroll
      for (int k = 0; k < kColumns; ++k)
        results.v[k] = pair_iou<kKind>(row_box, row_area, mine[k], my_area[k]);
      if (packed) {
        stream_packed(row, results);
      } else {
#pragma unroll
        for (int k = 0; k < kColumns; ++k)
          if (j + k * kThreads < columns) row[k * kThreads] = results.v[k];
      }
    }
  }
}

Tensor box_iou_cuda(const Tensor& boxes1, const Tensor& boxes2, std::string kind) {
  check_box_iou(boxes1, boxes2, "box_iou");
  const CudaScope scope("box_iou", boxes1, boxes2);
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  const int64_t rows = a.size(0), columns = b.size(0);
  Tensor out = empty_tensor(a, {rows, columns});
  if (rows == 0 || columns == 0) return out;
  dispatch_compute(a.scalar_type(), "box_iou", [&](auto zero) {
    using T = decltype(zero);
    const dim3 grid(unsigned(ceil_div(columns, kThreads * Packed<T>::kSize)),
                    unsigned(std::min<int64_t>(ceil_div(rows, kRows), kTiles)));
    dispatch_iou_kind(kind, "box_iou", [&](auto kind_constant) {
      launch("box_iou_kernel", box_iou_kernel<T, decltype(kind_constant)::value>, grid, kThreads, 0,
             scope, data<Box<T>>(a), data<Box<T>>(b), rows, columns, data<T>(out));
    });
  });
  return out;
}

// Writes out[row], or with several tiles the partial sums [row, coordinate, tile].
template <typename T, IouKind kKind>
__global__ void __launch_bounds__(kThreads)
    box_iou_backward_kernel(const T* __restrict__ grad, const Box<T>* __restrict__ boxes1,
                            const Box<T>* __restrict__ boxes2, int64_t rows, int64_t columns,
                            int64_t tile, T* __restrict__ out, double* __restrict__ partial) {
  // This warp's row and tile. A warp beyond the last row has nothing to do.
  const int64_t row = int64_t(blockIdx.x) * (kThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= rows) return;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = int64_t(blockIdx.y) * tile;
  const int64_t end = columns - begin < tile ? columns : begin + tile;
  // Add the derivatives of the lane's pairs, in order.
  const Box<T> mine = boxes1[row];
  T sum[4] = {0, 0, 0, 0};
  for (int64_t j = begin + lane; j < end; j += kWarp) {
    const T g = grad[row * columns + j];
    const Box<T> d = iou_like_derivatives<kKind>(mine, boxes2[j]);
    sum[0] += g * d.x1;
    sum[1] += g * d.y1;
    sum[2] += g * d.x2;
    sum[3] += g * d.y2;
  }
  // Add the lanes, and write the four sums.
  for (int k = 0; k < 4; ++k) {
    const T total = warp_sum(sum[k]);
    if (lane == 0 && partial) partial[(row * 4 + k) * gridDim.y + blockIdx.y] = total;
    if (lane == 0 && !partial) out[row * 4 + k] = total;
  }
}

Tensor box_iou_backward_cuda(const Tensor& grad, const Tensor& boxes1, const Tensor& boxes2,
                             std::string kind) {
  check_box_iou_backward(grad, boxes1, boxes2);
  const CudaScope scope("box_iou_backward", grad, boxes1, boxes2);
  const Tensor g = contiguous_aligned(grad);
  const Tensor a = contiguous_aligned(boxes1), b = contiguous_aligned(boxes2);
  const int64_t rows = a.size(0), columns = b.size(0);
  const int64_t out_shape[] = {rows, 4};
  Tensor out = empty_tensor(a, out_shape);
  if (rows == 0) return out;
  // The tiles of a row, none of them empty except for the only tile of a row without columns.
  const int64_t wanted =
      std::clamp<int64_t>(kBackwardWarps / rows, 1, std::max<int64_t>(columns / kLeastColumns, 1));
  const int64_t tile = std::max<int64_t>(ceil_div(columns, wanted), 1);
  const int64_t tiles = std::max<int64_t>(ceil_div(columns, tile), 1);
  std::optional<Tensor> partial;
  const int64_t partial_shape[] = {rows * 4, tiles};
  if (tiles > 1) partial = empty_tensor(a, partial_shape, ScalarType::Double);
  dispatch_compute(a.scalar_type(), "box_iou_backward", [&](auto zero) {
    using T = decltype(zero);
    double* partials = partial ? data<double>(*partial) : nullptr;
    const dim3 grid(unsigned(ceil_div(rows, kThreads / kWarp)), unsigned(tiles));
    dispatch_iou_kind(kind, "box_iou_backward", [&](auto kind_constant) {
      launch("box_iou_backward_kernel", box_iou_backward_kernel<T, decltype(kind_constant)::value>,
             grid, kThreads, 0, scope, data<T>(g), data<Box<T>>(a), data<Box<T>>(b), rows, columns,
             tile, data<T>(out), partials);
    });
    if (partial)
      launch("sum_partials_kernel", sum_partials_kernel<T>, dim3(unsigned(rows * 4)), kSumThreads,
             0, scope, partials, tiles, data<T>(out));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(retinanet_ops, CUDA, m) {
  m.impl("box_iou", TORCH_BOX(&box_iou_cuda));
  m.impl("box_iou_backward", TORCH_BOX(&box_iou_backward_cuda));
}

}  // namespace retinanet
