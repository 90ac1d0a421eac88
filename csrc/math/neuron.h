// One step of the neuron, forward and backward (method.md, section 1): charge, fire, reset.
// The order of operations is part of the contract: it decides which spikes fire.
#pragma once

#include "kinds.h"

namespace trt {
inline namespace TRT_ISA {

template <class F>
struct Neuron {
  F decay;  // 1 / tau for charges that leak
  F tau;    // 1 / decay, what charges that divide divide by
  F threshold;
  F v_reset;
  F fires_above;  // the threshold, or the number before it to fire at h >= threshold
};

template <class F>
TRT_HD bool fires(F h, const Neuron<F>& neuron) {
  return h > neuron.fires_above;
}

// h = join(k part(v, x), v, x). The factor k is the decay, or 1 / tau as a true division by tau.
// The constants are the derivatives of `part`, and of `join` where it reads v, x and k part itself.
struct Plain {
  template <class F>
  TRT_HD static F part(F v, F, const Neuron<F>&) {
    return v;
  }
  template <class F>
  TRT_HD static F join(F scaled, F, F x, const Neuron<F>&) {
    return scaled + x;
  }
  static constexpr int part_v = 1, part_x = 0, part_reset = 0;
  static constexpr int join_v = 0, join_x = 1, join_scaled = 1;
  static constexpr bool delays_reset = false;
};

struct Leaky {
  template <class F>
  TRT_HD static F part(F v, F x, const Neuron<F>& neuron) {
    return x - (v - neuron.v_reset);
  }
  template <class F>
  TRT_HD static F join(F scaled, F v, F, const Neuron<F>&) {
    return v + scaled;
  }
  static constexpr int part_v = -1, part_x = 1, part_reset = 1;
  static constexpr int join_v = 1, join_x = 0, join_scaled = 1;
  static constexpr bool delays_reset = false;
};

struct Resting {
  template <class F>
  TRT_HD static F part(F v, F, const Neuron<F>& neuron) {
    return v - neuron.v_reset;
  }
  template <class F>
  TRT_HD static F join(F scaled, F v, F x, const Neuron<F>&) {
    return v - scaled + x;
  }
  static constexpr int part_v = 1, part_x = 0, part_reset = -1;
  static constexpr int join_v = 1, join_x = 1, join_scaled = -1;
  static constexpr bool delays_reset = false;
};

struct Boxed : Leaky {
  template <class F>
  TRT_HD static F part(F v, F x, const Neuron<F>&) {
    return x - v;
  }
  static constexpr int part_reset = 0;
};

// v is the potential before a reset that takes place now, by the threshold and without a gradient
// through its spike.
struct DelayedReset : Plain {
  template <class F>
  TRT_HD static F join(F scaled, F v, F x, const Neuron<F>& neuron) {
    return scaled + x - (fires(v, neuron) ? neuron.threshold : F(0));
  }
  static constexpr bool delays_reset = true;
};

template <class F>
TRT_HD F factor_of(bool divides, const Neuron<F>& neuron) {
  return divides ? F(1) / neuron.tau : neuron.decay;
}

// base + times k, of two small constants.
template <int kBase, int kTimes, class F>
TRT_HD F affine(F k) {
  if (kTimes == 0) return F(kBase);
  return kBase == 0 ? F(kTimes) * k : F(kBase) + F(kTimes) * k;
}

// What the backward pass needs of k, where no spike depends on rounding: dh/dv, dh/dx, dh/dv_reset,
// and dh/dfactor, of k or of tau.
template <class Form, class F>
TRT_HD F slope_of(F k) {
  return affine<Form::join_v, Form::join_scaled * Form::part_v>(k);
}
template <class Form, class F>
TRT_HD F input_slope_of(F k) {
  return affine<Form::join_x, Form::join_scaled * Form::part_x>(k);
}
template <class Form, class F>
TRT_HD F reset_slope_of(F k) {
  return affine<0, Form::join_scaled * Form::part_reset>(k);
}
template <class Form, class F>
TRT_HD F factor_slope_of(bool divides, F k, F v, F x, const Neuron<F>& neuron) {
  const F part = F(Form::join_scaled) * Form::part(v, x, neuron);
  return divides ? -part * (k * k) : part;
}

template <class Form_, bool kDivides>
struct Charge {
  using Form = Form_;
  static constexpr bool divides = kDivides;

  template <class F>
  TRT_HD static F charge(F v, F x, const Neuron<F>& neuron) {
    const F part = Form::part(v, x, neuron);
    return Form::join(kDivides ? part / neuron.tau : neuron.decay * part, v, x, neuron);
  }
  template <class F>
  TRT_HD static F slope(const Neuron<F>& neuron) {
    return slope_of<Form>(factor_of(kDivides, neuron));
  }
  template <class F>
  TRT_HD static F input_slope(const Neuron<F>& neuron) {
    return input_slope_of<Form>(factor_of(kDivides, neuron));
  }
  template <class F>
  TRT_HD static F reset_slope(const Neuron<F>& neuron) {
    return reset_slope_of<Form>(factor_of(kDivides, neuron));
  }
  template <class F>
  TRT_HD static F factor_slope(F v, F x, const Neuron<F>& neuron) {
    return factor_slope_of<Form>(kDivides, factor_of(kDivides, neuron), v, x, neuron);
  }
};

struct Decay : Charge<Plain, false> {
  static constexpr const char* name = "decay";
};
struct Divide : Charge<Plain, true> {
  static constexpr const char* name = "divide";
};
struct Leak : Charge<Leaky, false> {
  static constexpr const char* name = "leak";
};
struct LeakDivide : Charge<Leaky, true> {
  static constexpr const char* name = "leak_divide";
};
struct Rest : Charge<Resting, false> {
  static constexpr const char* name = "rest";
};
struct RestDivide : Charge<Resting, true> {
  static constexpr const char* name = "rest_divide";
};
struct Box : Charge<Boxed, false> {
  static constexpr const char* name = "box";
};
struct Delayed : Charge<DelayedReset, false> {
  static constexpr const char* name = "delayed";
};

using Forms = KindList<Plain, Leaky, Resting, Boxed, DelayedReset>;
using Charges = KindList<Decay, Divide, Leak, LeakDivide, Rest, RestDivide, Box, Delayed>;

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
