// Boxes as deltas from their anchors and back (Girshick et al. 2014, appendix C): a delta is the
// offset of the centre in units of the anchor's size and the logarithm of the ratio of sizes, times
// the coder's weights.
#pragma once

#include "common/anchors.h"

namespace retinanet {

template <typename T>
struct BoxCoder {
  T weight[4];
  T min_log_ratio, max_log_ratio;  // bounds of dw and dh in decoding
  T offset;                        // 1 in coders that count pixels: a box's width is x2 - x1 + 1

  HOST_DEVICE Box<T> encode(const Box<T>& box, const Box<T>& anchor) const {
    const T w = side(box.x1, box.x2), h = side(box.y1, box.y2);
    const T aw = side(anchor.x1, anchor.x2), ah = side(anchor.y1, anchor.y2);
    const T dx = (box.x1 + T(0.5) * w - (anchor.x1 + T(0.5) * aw)) / aw;
    const T dy = (box.y1 + T(0.5) * h - (anchor.y1 + T(0.5) * ah)) / ah;
    return {weight[0] * dx, weight[1] * dy, weight[2] * std::log(w / aw),
            weight[3] * std::log(h / ah)};
  }

  HOST_DEVICE Box<T> decode(const Box<T>& delta, const Box<T>& anchor) const {
    const T aw = side(anchor.x1, anchor.x2), ah = side(anchor.y1, anchor.y2);
    const T cx = delta.x1 / weight[0] * aw + (anchor.x1 + T(0.5) * aw);
    const T cy = delta.y1 / weight[1] * ah + (anchor.y1 + T(0.5) * ah);
    const T half_w = std::exp(bounded(delta.x2 / weight[2])) * aw * T(0.5);
    const T half_h = std::exp(bounded(delta.y2 / weight[3])) * ah * T(0.5);
    return {cx - half_w, cy - half_h, cx + half_w - offset, cy + half_h - offset};
  }

  // Derivatives by the deltas, from those by the decoded box; 0 where a bound holds.
  HOST_DEVICE Box<T> decode_grad(const Box<T>& delta, const Box<T>& anchor,
                                 const Box<T>& grad) const {
    const T aw = side(anchor.x1, anchor.x2), ah = side(anchor.y1, anchor.y2);
    const T w = delta.x2 / weight[2], h = delta.y2 / weight[3];
    const T half_w = std::exp(bounded(w)) * aw * T(0.5),
            half_h = std::exp(bounded(h)) * ah * T(0.5);
    return {(grad.x1 + grad.x2) * aw / weight[0], (grad.y1 + grad.y2) * ah / weight[1],
            is_bounded(w) ? T(0) : (grad.x2 - grad.x1) * half_w / weight[2],
            is_bounded(h) ? T(0) : (grad.y2 - grad.y1) * half_h / weight[3]};
  }

 private:
  HOST_DEVICE T side(T begin, T end) const { return end - begin + offset; }
  // NaN passes through.
  HOST_DEVICE T bounded(T log_ratio) const {
    const T low = log_ratio < min_log_ratio ? min_log_ratio : log_ratio;
    return low > max_log_ratio ? max_log_ratio : low;
  }
  HOST_DEVICE bool is_bounded(T log_ratio) const {
    return log_ratio < min_log_ratio || log_ratio > max_log_ratio;
  }
};

template <typename T>
inline BoxCoder<T> box_coder(const std::vector<double>& weights, double min_log_ratio,
                             double max_log_ratio, double offset, const char* op) {
  check(weights.size() == 4, op, ": weights must hold 4 numbers, got ", weights.size());
  return {{T(weights[0]), T(weights[1]), T(weights[2]), T(weights[3])},
          T(min_log_ratio),
          T(max_log_ratio),
          T(offset)};
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
