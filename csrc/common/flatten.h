// FLATTEN marks a function or lambda of CPU code into which the compiler inlines all calls, and
// their calls in turn.
//
// Without it, the compiler calls the short functions of numbers with derivatives (iou_kinds.h) one
// by one, which takes several times as long.
#pragma once

#define FLATTEN __attribute__((flatten))
