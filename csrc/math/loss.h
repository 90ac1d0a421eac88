// One element of the temporal loss (method.md, section 4).
//
// A row of logits O has the cross entropy sum_c q_c (log_normalizer - O_c), where q_c is the share
// of class c: its smoothed target, times class weights. The squared term compares O_c with p_c.
#pragma once

#include "platform.h"

namespace trt {
inline namespace TRT_ISA {

// Smoothed target p_c of a class whose given target is `given` (1 or 0, or a probability).
template <class F>
TRT_HD F smoothed_target(F given, F smoothing, F classes) {
  return given * (F(1) - smoothing) + smoothing / classes;
}

// e^z for z <= 0.
template <class F>
TRT_HD F exp_nonpositive(F z) {
  return exp2_nonpositive(z * F(kLog2E));
}

// d/dO_c of a row's cross entropy.
template <class F>
TRT_HD F entropy_gradient(F logit, F log_normalizer, F share, F all_shares) {
  return all_shares * exp_nonpositive(logit - log_normalizer) - share;
}

// d/dO_c of (O_c - p_c)^2.
template <class F>
TRT_HD F square_gradient(F logit, F target) {
  return F(2) * (logit - target);
}

}  // namespace TRT_ISA
}  // namespace trt
