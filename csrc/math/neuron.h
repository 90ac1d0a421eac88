// One step of the neuron, forward and backward (method.md, section 1): charge, fire, reset.
// The order of operations is part of the contract: it decides which spikes fire.
#pragma once

#include "kinds.h"

namespace trt {
inline namespace TRT_ISA {

template <class F>
struct Neuron {
  F decay;  // of "leak" 1 / tau
  F tau;    // 1 / decay, what the charge "divide" divides by
  F threshold;
  F v_reset;
  F fires_above;  // the threshold, or the number before it to fire at h >= threshold
};

// h = charge(v, x), and what the backward pass needs, where no spike depends on rounding: dh/dv,
// dh/dx, dh/dfactor (the decay, or tau) and dh/dv_reset.
struct Decay {
  static constexpr const char* name = "decay";
  template <class F>
  TRT_HD static F charge(F v, F x, const Neuron<F>& neuron) {
    return neuron.decay * v + x;
  }
  template <class F>
  TRT_HD static F slope(const Neuron<F>& neuron) {
    return neuron.decay;
  }
  template <class F>
  TRT_HD static F input_slope(const Neuron<F>&) {
    return F(1);
  }
  template <class F>
  TRT_HD static F factor_slope(F v, F, const Neuron<F>&) {
    return v;
  }
  template <class F>
  TRT_HD static F reset_slope(const Neuron<F>&) {
    return F(0);
  }
};

struct Divide {
  static constexpr const char* name = "divide";
  template <class F>
  TRT_HD static F charge(F v, F x, const Neuron<F>& neuron) {
    return v / neuron.tau + x;
  }
  template <class F>
  TRT_HD static F slope(const Neuron<F>& neuron) {
    return F(1) / neuron.tau;
  }
  template <class F>
  TRT_HD static F input_slope(const Neuron<F>&) {
    return F(1);
  }
  template <class F>
  TRT_HD static F factor_slope(F v, F, const Neuron<F>& neuron) {
    return -v / (neuron.tau * neuron.tau);
  }
  template <class F>
  TRT_HD static F reset_slope(const Neuron<F>&) {
    return F(0);
  }
};

struct Leak {
  static constexpr const char* name = "leak";
  template <class F>
  TRT_HD static F charge(F v, F x, const Neuron<F>& neuron) {
    return v + (x - (v - neuron.v_reset)) * neuron.decay;
  }
  template <class F>
  TRT_HD static F slope(const Neuron<F>& neuron) {
    return F(1) - neuron.decay;
  }
  template <class F>
  TRT_HD static F input_slope(const Neuron<F>& neuron) {
    return neuron.decay;
  }
  template <class F>
  TRT_HD static F factor_slope(F v, F x, const Neuron<F>& neuron) {
    return x - (v - neuron.v_reset);
  }
  template <class F>
  TRT_HD static F reset_slope(const Neuron<F>& neuron) {
    return neuron.decay;
  }
};

using Charges = KindList<Decay, Divide, Leak>;

template <class F>
TRT_HD bool fires(F h, const Neuron<F>& neuron) {
  return h > neuron.fires_above;
}

// v = after(h, s). Backward, `spike_gradient` is ds with what dv adds to it through the spike, and
// `through_potential` what dv adds to dh directly. A reset that uses v_reset or the threshold
// passes s dv, or -s dv, to it.
struct HardReset {
  static constexpr const char* name = "hard";
  template <class F>
  TRT_HD static F after(F h, bool s, const Neuron<F>& neuron) {
    return s ? neuron.v_reset : h;
  }
  template <class F>
  TRT_HD static F spike_gradient(F ds, F h, F dv, const Neuron<F>& neuron) {
    return ds + (neuron.v_reset - h) * dv;
  }
  template <class F>
  TRT_HD static F through_potential(bool s, F dv) {
    return s ? F(0) : dv;
  }
  static constexpr bool uses_v_reset = true, uses_threshold = false;
};

struct SoftReset {
  static constexpr const char* name = "soft";
  template <class F>
  TRT_HD static F after(F h, bool s, const Neuron<F>& neuron) {
    return h - neuron.threshold * (s ? F(1) : F(0));
  }
  template <class F>
  TRT_HD static F spike_gradient(F ds, F, F dv, const Neuron<F>& neuron) {
    return ds - neuron.threshold * dv;
  }
  template <class F>
  TRT_HD static F through_potential(bool, F dv) {
    return dv;
  }
  static constexpr bool uses_v_reset = false, uses_threshold = true;
};

struct NoReset {
  static constexpr const char* name = "none";
  template <class F>
  TRT_HD static F after(F h, bool, const Neuron<F>&) {
    return h;
  }
  template <class F>
  TRT_HD static F spike_gradient(F ds, F, F, const Neuron<F>&) {
    return ds;
  }
  template <class F>
  TRT_HD static F through_potential(bool, F dv) {
    return dv;
  }
  static constexpr bool uses_v_reset = false, uses_threshold = false;
};

// The same reset with no gradient through its spike.
template <class Reset>
struct Detached : Reset {
  template <class F>
  TRT_HD static F spike_gradient(F ds, F, F, const Neuron<F>&) {
    return ds;
  }
};

using Resets = KindList<HardReset, SoftReset, NoReset>;

// dL/dh of one step from what arrives at its spike (ds) and at its potential after the reset (dv).
template <class Reset, class Surrogate, class F>
TRT_HD F potential_gradient(F h, F ds, F dv, F surrogate_parameter, const Neuron<F>& neuron) {
  return Reset::spike_gradient(ds, h, dv, neuron) *
             Surrogate::derivative(h - neuron.threshold, surrogate_parameter) +
         Reset::through_potential(fires(h, neuron), dv);
}

}  // namespace TRT_ISA
}  // namespace trt
