// Boxes as deltas from their anchors and back (Girshick et al. 2014, appendix C): a delta is the
// offset of the centre in units of the anchor's size and the logarithm of the ratio of sizes, times
// the coder's weights.
#pragma once

#include "anchors.h"

namespace retinanet {

template <typename T>
struct BoxCoder {
  T weight[4];
  T min_log_ratio, max_log_ratio;  // bounds of dw and dh in decoding

  HOST_DEVICE Box<T> encode(const Box<T>& box, const Box<T>& anchor) const {
    const T w = box.x2 - box.x1, h = box.y2 - box.y1, aw = anchor.x2 - anchor.x1,
            ah = anchor.y2 - anchor.y1;
    const T dx = (box.x1 + T(0.5) * w - (anchor.x1 + T(0.5) * aw)) / aw;
    const T dy = (box.y1 + T(0.5) * h - (anchor.y1 + T(0.5) * ah)) / ah;
    return {weight[0] * dx, weight[1] * dy, weight[2] * std::log(w / aw),
            weight[3] * std::log(h / ah)};
  }

  HOST_DEVICE Box<T> decode(const Box<T>& delta, const Box<T>& anchor) const {
    const T aw = anchor.x2 - anchor.x1, ah = anchor.y2 - anchor.y1;
    const T cx = delta.x1 / weight[0] * aw + (anchor.x1 + T(0.5) * aw);
    const T cy = delta.y1 / weight[1] * ah + (anchor.y1 + T(0.5) * ah);
    const T half_w = std::exp(bounded(delta.x2 / weight[2])) * aw * T(0.5);
    const T half_h = std::exp(bounded(delta.y2 / weight[3])) * ah * T(0.5);
    return {cx - half_w, cy - half_h, cx + half_w, cy + half_h};
  }

 private:
  // NaN passes through.
  HOST_DEVICE T bounded(T log_ratio) const {
    const T low = log_ratio < min_log_ratio ? min_log_ratio : log_ratio;
    return low > max_log_ratio ? max_log_ratio : low;
  }
};

template <typename T>
inline BoxCoder<T> box_coder(const std::vector<double>& weights, double min_log_ratio,
                             double max_log_ratio, const char* op) {
  check(weights.size() == 4, op, ": weights must hold 4 numbers, got ", weights.size());
  return {{T(weights[0]), T(weights[1]), T(weights[2]), T(weights[3])},
          T(min_log_ratio),
          T(max_log_ratio)};
}

// A coordinate clipped to 0 .. limit; NaN passes through.
template <typename T>
HOST_DEVICE T clipped(T v, T limit) {
  const T low = v < T(0) ? T(0) : v;
  return low > limit ? limit : low;
}

template <typename T>
HOST_DEVICE Box<T> clip(const Box<T>& b, T height, T width) {
  return {clipped(b.x1, width), clipped(b.y1, height), clipped(b.x2, width), clipped(b.y2, height)};
}

// Rows of boxes or deltas, [A, 4] or [N, A, 4].
struct BoxRows {
  int64_t images, rows;

  BoxRows(const Tensor& t, const char* op, const char* name) {
    check((t.dim() == 2 || t.dim() == 3) && t.size(t.dim() - 1) == 4, op, ": ", name,
          " must have shape [A, 4] or [N, A, 4], got ", shape(t));
    images = t.dim() == 3 ? t.size(0) : 1;
    rows = t.size(t.dim() - 2);
  }
};

inline void check_image_sizes(const Tensor& image_sizes, int64_t images, ScalarType dtype,
                              const char* op) {
  check_shape(image_sizes, {images, 2}, op, "image_sizes");
  check_dtype(image_sizes, dtype, op, "image_sizes");
}

inline void check_anchor_rows(const AnchorArgument& anchors, const BoxRows& rows, const char* op) {
  check(anchors.count == rows.rows, op, ": expected one row per anchor, got ", rows.rows,
        " rows for ", anchors.count, " anchors");
  check(!anchors.batched || anchors.tensor.size(0) == rows.images, op, ": anchors ",
        shape(anchors.tensor), " do not fit a batch of ", rows.images, " images");
}

}  // namespace retinanet
