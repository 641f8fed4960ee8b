// The schemas of all ops. Default values live in the Python wrappers.
//
// Ops that need anchors take three arguments. For explicit anchors, `anchors` is [A, 4] or
// [N, A, 4] and both lists are empty. For a grid, `anchors` holds the base anchors, `grid_sizes` is
// (height, width, anchors per cell) of each level, and `grid_steps` is
// (stride y, stride x, offset y, offset x) of each level.
//
// A bound of type `float?` that is None does not apply. No op receives an infinite number, because
// exported graphs cannot store one.
#include "common/tensor.h"

STABLE_TORCH_LIBRARY(retinanet_ops, m) {
  // focal_loss
  m.def(
      "sigmoid_focal_loss(Tensor inputs, Tensor targets, Tensor? pos_weight, float alpha, "
      "float gamma, float? ignore_value, bool reduce) -> Tensor");
  m.def(
      "sigmoid_focal_loss_backward(Tensor grad, Tensor inputs, Tensor targets, "
      "Tensor? pos_weight, float alpha, float gamma, float? ignore_value) -> Tensor");
  // dense_focal_loss
  m.def(
      "dense_focal_loss(Tensor[] cls_logits, Tensor labels, Tensor? anchor_weight, "
      "SymInt num_classes, float alpha, float gamma, float label_smoothing) -> Tensor");
  m.def(
      "dense_focal_loss_backward(Tensor grad, Tensor[] cls_logits, Tensor labels, "
      "Tensor? anchor_weight, SymInt num_classes, float alpha, float gamma, float label_smoothing) "
      "-> Tensor[]");
  // matching
  m.def(
      "assign_targets(Tensor anchors, SymInt[] grid_sizes, float[] grid_steps, Tensor gt_boxes, "
      "Tensor? gt_labels, Tensor gt_count, Tensor? crowd_boxes, Tensor? crowd_count, "
      "float fg_iou_threshold, float bg_iou_threshold, str low_quality, float low_quality_min_iou, "
      "float crowd_ioa_threshold, bool statistics) "
      "-> (Tensor matches, Tensor labels, Tensor num_positive, Tensor ious, Tensor best_ious, "
      "Tensor gt_positives)");
  // assign_points
  m.def(
      "assign_points(Tensor anchors, SymInt[] grid_sizes, float[] grid_steps, "
      "SymInt[] level_sizes, Tensor gt_boxes, Tensor gt_labels, Tensor gt_count, float? radius, "
      "float lowest_distance, float highest_distance) "
      "-> (Tensor matches, Tensor labels, Tensor num_positive)");
  // box_coding
  m.def(
      "encode_boxes(Tensor boxes, Tensor anchors, SymInt[] grid_sizes, float[] grid_steps, "
      "float[] coder_weights, float offset) -> Tensor");
  m.def(
      "decode_boxes(Tensor deltas, Tensor anchors, SymInt[] grid_sizes, float[] grid_steps, "
      "float[] coder_weights, float? min_log_ratio, float? max_log_ratio, float offset, "
      "Tensor? image_sizes) -> Tensor");
  m.def("clip_boxes(Tensor boxes, Tensor image_sizes) -> Tensor");
  // dense_box_loss
  m.def(
      "dense_box_loss(Tensor[] box_deltas, Tensor anchors, SymInt[] grid_sizes, "
      "float[] grid_steps, Tensor gt_boxes, Tensor matches, str kind, float beta, "
      "float[] coder_weights, float? max_log_ratio, float offset) -> (Tensor, Tensor)");
  m.def(
      "dense_box_loss_backward(Tensor grad, Tensor[] box_deltas, Tensor anchors, "
      "SymInt[] grid_sizes, float[] grid_steps, Tensor gt_boxes, Tensor matches, Tensor matched, "
      "str kind, float beta, float[] coder_weights, float? max_log_ratio, float offset) -> "
      "Tensor[]");
  // box_iou
  m.def("box_iou(Tensor boxes1, Tensor boxes2, str kind) -> Tensor");
  m.def("box_iou_backward(Tensor grad, Tensor boxes1, Tensor boxes2, str kind) -> Tensor");
  // box_iou_loss
  m.def("box_iou_loss(Tensor boxes1, Tensor boxes2, str kind) -> Tensor");
  m.def("box_iou_loss_backward(Tensor grad, Tensor boxes1, Tensor boxes2, str kind) -> Tensor");
  // nms
  m.def("rank_scores(Tensor scores, Tensor? counts) -> (Tensor order, Tensor valid)");
  m.def(
      "nms_sorted(Tensor boxes, Tensor? order, Tensor count, Tensor? labels, float iou_threshold, "
      "SymInt max_detections, SymInt max_per_class, bool class_agnostic) "
      "-> (Tensor index, Tensor count, Tensor truncated)");
  m.def(
      "batched_nms_padded(Tensor boxes, Tensor scores, Tensor? labels, Tensor? counts, "
      "float iou_threshold, SymInt max_detections) -> (Tensor index, Tensor count)");
  m.def("nms(Tensor boxes, Tensor scores, Tensor? labels, float iou_threshold) -> Tensor");
  // soft_nms
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor? labels, Tensor? counts, str method, "
      "float iou_threshold, float sigma, float min_score, SymInt max_detections) "
      "-> (Tensor index, Tensor scores, Tensor count)");
  m.def(
      "soft_nms_scores(Tensor boxes, Tensor scores, Tensor? labels, Tensor? counts, str method, "
      "float iou_threshold, float sigma) -> Tensor");
  // hard_negative_mask
  m.def(
      "hard_negative_mask(Tensor loss, Tensor labels, float ratio, SymInt min_negatives) "
      "-> Tensor");
  // gather_class_scores
  m.def(
      "gather_class_scores(Tensor[] cls_logits, Tensor anchor_index, SymInt num_classes) "
      "-> Tensor");
  // detect
  m.def(
      "detect(Tensor[] cls_logits, Tensor[] box_deltas, Tensor anchors, SymInt[] grid_sizes, "
      "float[] grid_steps, Tensor image_sizes, float score_threshold, SymInt topk, "
      "float iou_threshold, SymInt max_detections, SymInt max_per_class, bool class_agnostic, "
      "float[] coder_weights, float? min_log_ratio, float? max_log_ratio, float offset, "
      "bool clip_after_nms) "
      "-> (Tensor boxes, Tensor scores, Tensor labels, Tensor count, Tensor anchor_index, "
      "Tensor truncated)");
  m.def(
      "select_candidates(Tensor[] cls_logits, SymInt num_classes, float score_threshold, "
      "SymInt topk) -> (Tensor keys, Tensor truncated)");
  m.def(
      "decode_candidates(Tensor keys, Tensor[] box_deltas, Tensor anchors, SymInt[] grid_sizes, "
      "float[] grid_steps, Tensor? image_sizes, SymInt num_classes, float[] coder_weights, "
      "float? min_log_ratio, float? max_log_ratio, float offset) "
      "-> (Tensor boxes, Tensor scores, Tensor labels, Tensor anchor_index)");
  // dense_softmax_cross_entropy
  m.def(
      "dense_softmax_cross_entropy(Tensor[] cls_logits, Tensor targets, SymInt num_classes) "
      "-> (Tensor loss, Tensor softmax)");
  m.def(
      "dense_softmax_cross_entropy_backward(Tensor grad, Tensor[] cls_logits, Tensor targets, "
      "Tensor softmax, SymInt num_classes) -> Tensor[]");
}
