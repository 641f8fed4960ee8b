// Boxes encoded as deltas from their anchors, and decoded again (Girshick et al. 2014, appendix C).
//
// dx and dy are the offset of the box's centre from the anchor's, in units of the anchor's size. dw
// and dh are the logarithms of the box's size over the anchor's. All four are multiplied by the
// weights of the coder.
#pragma once

#include "common/anchors.h"

namespace retinanet {

template <typename T>
struct BoxCoder {
  T weight[4];                     // of dx, dy, dw, dh
  T min_log_ratio, max_log_ratio;  // decoding clamps dw / weight and dh / weight to these bounds
  T offset;                        // 1 in coders where a box is x2 - x1 + 1 pixels wide, else 0

  HOST_DEVICE Box<T> encode(const Box<T>& box, const Box<T>& anchor) const {
    const T w = side(box.x1, box.x2), h = side(box.y1, box.y2);
    const T aw = side(anchor.x1, anchor.x2), ah = side(anchor.y1, anchor.y2);
    const T dx = (box.x1 + T(0.5) * w - (anchor.x1 + T(0.5) * aw)) / aw;
    const T dy = (box.y1 + T(0.5) * h - (anchor.y1 + T(0.5) * ah)) / ah;
    return {weight[0] * dx, weight[1] * dy, weight[2] * std::log(w / aw),
            weight[3] * std::log(h / ah)};
  }

  // A Box is used for deltas, too: (x1, y1, x2, y2) holds (dx, dy, dw, dh).
  HOST_DEVICE Box<T> decode(const Box<T>& delta, const Box<T>& anchor) const {
    const T aw = side(anchor.x1, anchor.x2), ah = side(anchor.y1, anchor.y2);
    const T cx = delta.x1 / weight[0] * aw + (anchor.x1 + T(0.5) * aw);
    const T cy = delta.y1 / weight[1] * ah + (anchor.y1 + T(0.5) * ah);
    const T half_w = std::exp(bounded(delta.x2 / weight[2])) * aw * T(0.5);
    const T half_h = std::exp(bounded(delta.y2 / weight[3])) * ah * T(0.5);
    return {cx - half_w, cy - half_h, cx + half_w - offset, cy + half_h - offset};
  }

  // The gradient with respect to the deltas, given `grad`, the gradient with respect to the decoded
  // box. It is 0 for a clamped dw or dh.
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
  // Both comparisons are false for NaN, which is returned as it is.
  HOST_DEVICE T bounded(T log_ratio) const {
    const T low = log_ratio < min_log_ratio ? min_log_ratio : log_ratio;
    return low > max_log_ratio ? max_log_ratio : low;
  }
  HOST_DEVICE bool is_bounded(T log_ratio) const {
    return log_ratio < min_log_ratio || log_ratio > max_log_ratio;
  }
};

// The coder in compute dtype T, from the arguments of a schema.
template <typename T>
inline BoxCoder<T> box_coder(const std::vector<double>& weights,
                             std::optional<double> min_log_ratio,
                             std::optional<double> max_log_ratio, double offset, const char* op) {
  constexpr double kUnbounded = std::numeric_limits<double>::infinity();
  check(weights.size() == 4, op, ": coder_weights must hold 4 numbers, got ", weights.size());
  return {{T(weights[0]), T(weights[1]), T(weights[2]), T(weights[3])},
          T(min_log_ratio.value_or(-kUnbounded)),
          T(max_log_ratio.value_or(kUnbounded)),
          T(offset)};
}

// A coordinate clipped to 0 .. limit. NaN stays NaN.
template <typename T>
HOST_DEVICE T clipped(T v, T limit) {
  const T low = v < T(0) ? T(0) : v;
  return low > limit ? limit : low;
}

template <typename T>
HOST_DEVICE Box<T> clip(const Box<T>& b, T height, T width) {
  return {clipped(b.x1, width), clipped(b.y1, height), clipped(b.x2, width), clipped(b.y2, height)};
}

// The size of a tensor of boxes or deltas, [A, 4] or [N, A, 4]. A tensor without N is one image.
struct BoxRows {
  int64_t images, rows;  // rows of each image

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

// The arguments that encode_boxes and decode_boxes share, checked once for both backends.
struct BoxCodingArguments {
  BoxRows shape;
  Tensor rows;  // the boxes to encode or the deltas to decode
  AnchorArgument anchors;
  const char* op;

  BoxCodingArguments(const Tensor& rows_, const char* name, const Tensor& anchors_,
                     const std::vector<int64_t>& grid_sizes, const std::vector<double>& grid_steps,
                     const char* op_)
      : shape(rows_, op_, name),
        rows(contiguous_aligned(rows_)),
        anchors(anchors_, grid_sizes, grid_steps, op_),
        op(op_) {
    check(anchors.count == shape.rows, op, ": expected one row for each of the ", anchors.count,
          " anchors, got ", shape.rows);
    check(!anchors.batched || anchors.tensor.size(0) == shape.images, op, ": anchors must have ",
          shape.images, " images as ", name, " do, got ", retinanet::shape(anchors.tensor));
  }
};

}  // namespace retinanet
