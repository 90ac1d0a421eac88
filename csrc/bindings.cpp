// The Python module `trt_kernels._C`: addresses and sizes in, nothing owned, the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "ops.h"

#ifndef TRT_KERNELS_MODULE
#define TRT_KERNELS_MODULE _C
#endif

namespace py = pybind11;
using namespace pybind11::literals;

namespace {

using Address = std::uintptr_t;
template <class T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

// A scalar of the sum's type, read or written on the CPU.
double read_scalar(trt::DType dtype, Address address) {
  return dtype == trt::DType::float64 ? *pointer<const double>(address)
                                      : *pointer<const float>(address);
}
void write_scalar(trt::DType dtype, Address address, double value) {
  if (dtype == trt::DType::float64) {
    *pointer<double>(address) = value;
  } else {
    *pointer<float>(address) = static_cast<float>(value);
  }
}

trt::LIFSettings make_lif(const std::string& charge, const std::string& reset,
                          const std::string& surrogate, const std::string& phi, double decay,
                          double tau, double threshold, double v_reset, bool detach_reset,
                          bool fire_at_threshold, double surrogate_parameter, double delta,
                          double eps, double scale, bool batch, int bits) {
  trt::LIFSettings settings = trt::LIFSettings::make(charge, reset, surrogate, phi);
  settings.decay = decay;
  settings.tau = tau;
  settings.threshold = threshold;
  settings.v_reset = v_reset;
  settings.detach_reset = detach_reset;
  settings.fire_at_threshold = fire_at_threshold;
  settings.surrogate_parameter = surrogate_parameter;
  settings.delta = delta;
  settings.eps = eps;
  settings.scale = scale;
  settings.batch = batch;
  settings.bits = bits;
  return settings;
}

// Sizes of a sequence that fills its memory in this order, as [outer][steps][inner].
trt::LIFShape make_shape(trt::DType dtype, const std::vector<std::int64_t>& sizes,
                         std::size_t time_dim) {
  trt::LIFShape shape{dtype, 1, sizes.at(time_dim), 1};
  for (std::size_t dim = 0; dim < time_dim; ++dim) shape.outer *= sizes[dim];
  for (std::size_t dim = time_dim + 1; dim < sizes.size(); ++dim) shape.inner *= sizes[dim];
  shape.channel_stride = std::max<std::int64_t>(1, shape.neurons());
  return shape;
}

void check_phi(const trt::LIFSettings& settings, const void* weight) {
  if (weight && !settings.penalizes())
    throw std::invalid_argument("a penalty's weight needs a phi");
}

// Spikes of x and nothing else.
trt::LIFForward plain_forward(const trt::LIFShape& shape, Address x, Address spikes,
                              Address checkpoints = 0, int checkpoint_every = 0) {
  trt::LIFForward arguments{};
  arguments.shape = shape;
  arguments.x = pointer(x);
  arguments.spikes = pointer(spikes);
  arguments.checkpoints = pointer(checkpoints);
  arguments.checkpoint_every = checkpoint_every;
  return arguments;
}
trt::LIFBackward plain_backward(const trt::LIFShape& shape, Address x, Address grad_spikes,
                                Address grad_x, Address checkpoints = 0, int checkpoint_every = 0) {
  trt::LIFBackward arguments{};
  arguments.shape = shape;
  arguments.x = pointer(x);
  arguments.grad_spikes = pointer(grad_spikes);
  arguments.grad_x = pointer(grad_x);
  arguments.checkpoints = pointer(checkpoints);
  arguments.checkpoint_every = checkpoint_every;
  return arguments;
}

// The addresses of what a call carries on beside x and spikes; 0 where there is none.
struct Carried {
  Address v_init, state, potential;
};
trt::LIFForward carried_forward(trt::LIFForward arguments, const Carried& carried) {
  arguments.v_init = pointer(carried.v_init);
  arguments.state = pointer(carried.state);
  arguments.potential = pointer(carried.potential);
  return arguments;
}
trt::LIFBackward carried_backward(trt::LIFBackward arguments, Address v_init,
                                  const Carried& gradients) {
  arguments.v_init = pointer(v_init);
  arguments.grad_v_init = pointer(gradients.v_init);
  arguments.grad_state = pointer(gradients.state);
  arguments.grad_potential = pointer(gradients.potential);
  return arguments;
}

// A Python class for the arguments of a direction; every pointer is an attribute to be set.
template <class Arguments>
py::class_<Arguments> lif_arguments(py::module_& module, const char* name) {
  py::class_<Arguments> arguments(module, name, py::module_local());
  arguments.def(py::init([](trt::DType dtype, std::int64_t outer, std::int64_t steps,
                            std::int64_t inner, std::int64_t channels, std::int64_t channel_stride,
                            bool constant, bool gains_by_channel, int checkpoint_every) {
                  Arguments a{};
                  a.shape = {dtype, outer, steps, inner, constant, channels, channel_stride};
                  a.by_channel.gains_by_channel = gains_by_channel;
                  a.checkpoint_every = checkpoint_every;
                  return a;
                }),
                "dtype"_a, "outer"_a, "steps"_a, "inner"_a, "channels"_a, "channel_stride"_a,
                py::kw_only(), "constant"_a, "gains_by_channel"_a, "checkpoint_every"_a);
  return arguments;
}
template <class Arguments, class Pointer>
void add_address(py::class_<Arguments>& arguments, const char* name, Pointer Arguments::* member) {
  arguments.def_property(name, nullptr, [member](Arguments& a, Address address) {
    a.*member = reinterpret_cast<Pointer>(address);
  });
}
template <class Arguments>
void add_by_channel(py::class_<Arguments>& arguments) {
  const auto add = [&](const char* name, const void* trt::LIFChannels::* member) {
    arguments.def_property(name, nullptr, [member](Arguments& a, Address address) {
      a.by_channel.*member = pointer<const void>(address);
    });
  };
  add("neuron", &trt::LIFChannels::neuron);
  add("stats", &trt::LIFChannels::stats);
  add("norm_weight", &trt::LIFChannels::norm_weight);
  add("norm_bias", &trt::LIFChannels::norm_bias);
  add("gains", &trt::LIFChannels::gains);
}

// (dtype, elements, address of the weight, address of the gradient or 0, accumulate)
using PenaltyRow = std::tuple<trt::DType, std::int64_t, Address, Address, bool>;

std::vector<trt::PenaltyTensor> penalty_tensors(const std::vector<PenaltyRow>& rows) {
  std::vector<trt::PenaltyTensor> tensors;
  for (const auto& [dtype, size, weight, grad, accumulate] : rows) {
    tensors.push_back({dtype, size, pointer(weight), pointer(grad), accumulate});
  }
  return tensors;
}

trt::LossTensors loss_tensors(Address logits, Address target, Address probabilities,
                              Address class_weight, Address log_normalizer, Address divisors = 0) {
  return {pointer(logits),         pointer<const std::int64_t>(target),
          pointer(probabilities),  pointer(class_weight),
          pointer(log_normalizer), pointer(divisors)};
}

#ifdef TRT_KERNELS_CUDA
trt::cuda::Queue queue(Address workspace, int device, Address stream) {
  return {pointer(workspace), device, pointer(stream)};
}
#endif

py::dict build_info() {
  py::dict info;
  info["compiler"] = TRT_KERNELS_COMPILER;
#ifdef _OPENMP
  info["openmp"] = true;
#else
  info["openmp"] = false;
#endif
#ifdef TRT_KERNELS_CUDA
  info["cuda"] = TRT_KERNELS_CUDA;
  info["cuda_architectures"] = trt::cuda::architectures();
  info["cuda_missing"] = py::none();
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = "";
  info["cuda_missing"] = TRT_KERNELS_CUDA_MISSING;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(TRT_KERNELS_MODULE, module, py::mod_gil_not_used()) {
  module.doc() = "Compiled kernels of trt_kernels. Private: use the functions of trt_kernels.";
  using release = py::call_guard<py::gil_scoped_release>;

  py::enum_<trt::DType>(module, "DType", py::module_local())
      .value("float32", trt::DType::float32)
      .value("float64", trt::DType::float64)
      .value("float16", trt::DType::float16)
      .value("bfloat16", trt::DType::bfloat16);

  auto forward = lif_arguments<trt::LIFForward>(module, "LIFForward");
  add_by_channel(forward);
  add_address(forward, "x", &trt::LIFForward::x);
  add_address(forward, "v_init", &trt::LIFForward::v_init);
  add_address(forward, "penalty_weight", &trt::LIFForward::weight);
  add_address(forward, "spikes", &trt::LIFForward::spikes);
  add_address(forward, "potential", &trt::LIFForward::potential);
  add_address(forward, "state", &trt::LIFForward::state);
  add_address(forward, "penalty", &trt::LIFForward::penalty);
  add_address(forward, "rate", &trt::LIFForward::rate);
  add_address(forward, "bits", &trt::LIFForward::bits);
  add_address(forward, "checkpoints", &trt::LIFForward::checkpoints);

  auto backward = lif_arguments<trt::LIFBackward>(module, "LIFBackward");
  add_by_channel(backward);
  add_address(backward, "x", &trt::LIFBackward::x);
  add_address(backward, "v_init", &trt::LIFBackward::v_init);
  add_address(backward, "penalty_weight", &trt::LIFBackward::weight);
  add_address(backward, "bits", &trt::LIFBackward::bits);
  add_address(backward, "means", &trt::LIFBackward::means);
  add_address(backward, "checkpoints", &trt::LIFBackward::checkpoints);
  add_address(backward, "grad_spikes", &trt::LIFBackward::grad_spikes);
  add_address(backward, "grad_potential", &trt::LIFBackward::grad_potential);
  add_address(backward, "grad_state", &trt::LIFBackward::grad_state);
  add_address(backward, "grad_penalty", &trt::LIFBackward::grad_penalty);
  add_address(backward, "grad_x", &trt::LIFBackward::grad_x);
  add_address(backward, "grad_v_init", &trt::LIFBackward::grad_v_init);
  add_address(backward, "grad_neuron", &trt::LIFBackward::grad_neuron);
  add_address(backward, "grad_affine", &trt::LIFBackward::grad_affine);
  add_address(backward, "grad_gains", &trt::LIFBackward::grad_gains);

  // The short forms are for spikes of x alone: setting attributes costs a small call a microsecond.
  py::class_<trt::LIFSettings>(module, "LIF", py::module_local())
      .def(py::init(&make_lif), py::kw_only(), "charge"_a, "reset"_a, "surrogate"_a, "phi"_a,
           "decay"_a, "tau"_a, "threshold"_a, "v_reset"_a, "detach_reset"_a, "fire_at_threshold"_a,
           "surrogate_parameter"_a, "delta"_a, "eps"_a, "scale"_a, "batch"_a, "bits"_a)
      .def(
          "cpu_forward",
          [](const trt::LIFSettings& self, const trt::LIFForward& arguments, int threads) {
            check_phi(self, arguments.weight);
            trt::cpu::lif_forward(self, arguments, threads);
          },
          release())
      .def(
          "cpu_backward",
          [](const trt::LIFSettings& self, const trt::LIFBackward& arguments, int threads) {
            trt::cpu::lif_backward(self, arguments, threads);
          },
          release())
      .def(
          "cpu_forward_plain",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address spikes, int threads) {
            const trt::LIFShape shape = make_shape(dtype, sizes, time_dim);
            trt::cpu::lif_forward(self, plain_forward(shape, x, spikes), threads);
          },
          release())
      .def(
          "cpu_backward_plain",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address grad_spikes, Address grad_x, int threads) {
            const trt::LIFShape shape = make_shape(dtype, sizes, time_dim);
            trt::cpu::lif_backward(self, plain_backward(shape, x, grad_spikes, grad_x), threads);
          },
          release())
      .def(
          "cpu_forward_carried",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address spikes, Address v_init, Address state,
             Address potential, int threads) {
            const trt::LIFForward plain =
                plain_forward(make_shape(dtype, sizes, time_dim), x, spikes);
            trt::cpu::lif_forward(self, carried_forward(plain, {v_init, state, potential}),
                                  threads);
          },
          release())
      .def(
          "cpu_backward_carried",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address grad_spikes, Address grad_x, Address v_init,
             Address grad_v_init, Address grad_state, Address grad_potential, int threads) {
            const trt::LIFBackward plain =
                plain_backward(make_shape(dtype, sizes, time_dim), x, grad_spikes, grad_x);
            trt::cpu::lif_backward(
                self, carried_backward(plain, v_init, {grad_v_init, grad_state, grad_potential}),
                threads);
          },
          release())
#ifdef TRT_KERNELS_CUDA
      .def(
          "cuda_forward_carried",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address spikes, Address v_init, Address state,
             Address potential, Address checkpoints, int checkpoint_every, int device,
             Address stream) {
            const trt::LIFForward plain = plain_forward(make_shape(dtype, sizes, time_dim), x,
                                                        spikes, checkpoints, checkpoint_every);
            trt::cuda::lif_forward(self, carried_forward(plain, {v_init, state, potential}),
                                   queue(0, device, stream));
          },
          release())
      .def(
          "cuda_backward_carried",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address grad_spikes, Address grad_x, Address v_init,
             Address grad_v_init, Address grad_state, Address grad_potential, Address checkpoints,
             int checkpoint_every, int device, Address stream) {
            const trt::LIFBackward plain =
                plain_backward(make_shape(dtype, sizes, time_dim), x, grad_spikes, grad_x,
                               checkpoints, checkpoint_every);
            trt::cuda::lif_backward(
                self, carried_backward(plain, v_init, {grad_v_init, grad_state, grad_potential}),
                queue(0, device, stream));
          },
          release())
      .def("cuda_forward_workspace", &trt::cuda::lif_forward_workspace)
      .def("cuda_backward_workspace", &trt::cuda::lif_backward_workspace)
      .def(
          "cuda_forward",
          [](const trt::LIFSettings& self, const trt::LIFForward& arguments, Address workspace,
             int device, Address stream) {
            check_phi(self, arguments.weight);
            trt::cuda::lif_forward(self, arguments, queue(workspace, device, stream));
          },
          release())
      .def(
          "cuda_backward",
          [](const trt::LIFSettings& self, const trt::LIFBackward& arguments, Address workspace,
             int device, Address stream) {
            trt::cuda::lif_backward(self, arguments, queue(workspace, device, stream));
          },
          release())
      .def(
          "cuda_forward_plain",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address spikes, Address checkpoints,
             int checkpoint_every, int device, Address stream) {
            const trt::LIFShape shape = make_shape(dtype, sizes, time_dim);
            trt::cuda::lif_forward(self,
                                   plain_forward(shape, x, spikes, checkpoints, checkpoint_every),
                                   queue(0, device, stream));
          },
          release())
      .def(
          "cuda_backward_plain",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address grad_spikes, Address grad_x,
             Address checkpoints, int checkpoint_every, int device, Address stream) {
            const trt::LIFShape shape = make_shape(dtype, sizes, time_dim);
            trt::cuda::lif_backward(
                self, plain_backward(shape, x, grad_spikes, grad_x, checkpoints, checkpoint_every),
                queue(0, device, stream));
          },
          release())
#endif
      ;

  py::class_<trt::Statistics>(module, "Statistics", py::module_local())
      .def(py::init([](trt::DType dtype, std::int64_t before, std::int64_t channels,
                       std::int64_t within, double eps, std::int64_t repeat, Address x,
                       Address stats) {
        return trt::Statistics{dtype, before, channels,   within,
                               eps,   repeat, pointer(x), pointer(stats)};
      }))
      .def("cpu", &trt::cpu::batch_statistics, release())
#ifdef TRT_KERNELS_CUDA
      .def("cuda_workspace", &trt::cuda::batch_statistics_workspace)
      .def(
          "cuda",
          [](const trt::Statistics& self, Address workspace, int device, Address stream) {
            trt::cuda::batch_statistics(self, queue(workspace, device, stream));
          },
          release())
#endif
      ;

  py::class_<trt::PenaltySettings>(module, "Penalty", py::module_local())
      .def(py::init([](std::vector<double> growth, double scale, double eps) {
             return trt::PenaltySettings{std::move(growth), scale, eps};
           }),
           py::kw_only(), "growth"_a, "scale"_a, "eps"_a)
      .def(
          "cpu_value",
          [](const trt::PenaltySettings& self, const std::vector<PenaltyRow>& rows,
             trt::DType dtype, Address out, int threads) {
            write_scalar(dtype, out, trt::cpu::penalty_value(self, penalty_tensors(rows), threads));
          },
          release())
      .def(
          "cpu_gradient",
          [](const trt::PenaltySettings& self, const std::vector<PenaltyRow>& rows, double scale,
             trt::DType dtype, Address upstream, int threads) {
            if (upstream) scale *= read_scalar(dtype, upstream);
            trt::cpu::penalty_gradient(self, penalty_tensors(rows), scale, threads);
          },
          release())
#ifdef TRT_KERNELS_CUDA
      .def("cuda_value_workspace", &trt::cuda::penalty_value_workspace)
      .def("cuda_gradient_workspace", &trt::cuda::penalty_gradient_workspace)
      .def(
          "cuda_value",
          [](const trt::PenaltySettings& self, const std::vector<PenaltyRow>& rows,
             trt::DType dtype, Address out, Address workspace, int device, Address stream) {
            trt::cuda::penalty_value(self, penalty_tensors(rows), dtype, pointer(out),
                                     queue(workspace, device, stream));
          },
          release())
      .def(
          "cuda_gradient",
          [](const trt::PenaltySettings& self, const std::vector<PenaltyRow>& rows, double scale,
             trt::DType dtype, Address upstream, Address workspace, int device, Address stream) {
            trt::cuda::penalty_gradient(self, penalty_tensors(rows), scale, dtype,
                                        pointer(upstream), queue(workspace, device, stream));
          },
          release())
#endif
      ;

  py::class_<trt::LossSettings>(module, "Loss", py::module_local())
      .def(py::init([](trt::DType dtype, std::int64_t steps, std::int64_t batch,
                       std::int64_t classes, std::int64_t step_stride, std::int64_t batch_stride,
                       double entropy_ratio, double square_ratio, std::optional<double> constant,
                       double label_smoothing, std::int64_t ignore_index) {
             return trt::LossSettings{dtype,
                                      steps,
                                      batch,
                                      classes,
                                      step_stride,
                                      batch_stride,
                                      entropy_ratio,
                                      square_ratio,
                                      constant.has_value(),
                                      constant.value_or(0.0),
                                      label_smoothing,
                                      ignore_index};
           }),
           py::kw_only(), "dtype"_a, "steps"_a, "batch"_a, "classes"_a, "step_stride"_a,
           "batch_stride"_a, "entropy_ratio"_a, "square_ratio"_a, "constant"_a, "label_smoothing"_a,
           "ignore_index"_a)
      .def(
          "cpu_value",
          [](const trt::LossSettings& self, Address logits, Address target, Address probabilities,
             Address class_weight, Address log_normalizer, Address out, int threads) {
            write_scalar(
                self.dtype, out,
                trt::cpu::loss_value(
                    self, loss_tensors(logits, target, probabilities, class_weight, log_normalizer),
                    threads));
          },
          release())
      .def(
          "cpu_gradient",
          [](const trt::LossSettings& self, Address logits, Address target, Address probabilities,
             Address class_weight, Address log_normalizer, Address upstream, Address grad,
             int threads) {
            trt::cpu::loss_gradient(
                self, loss_tensors(logits, target, probabilities, class_weight, log_normalizer),
                read_scalar(self.dtype, upstream), pointer(grad), threads);
          },
          release())
#ifdef TRT_KERNELS_CUDA
      .def("cuda_workspace", &trt::cuda::loss_workspace)
      .def(
          "cuda_value",
          [](const trt::LossSettings& self, Address logits, Address target, Address probabilities,
             Address class_weight, Address log_normalizer, Address divisors, Address out,
             Address workspace, int device, Address stream) {
            trt::cuda::loss_value(
                self,
                loss_tensors(logits, target, probabilities, class_weight, log_normalizer, divisors),
                pointer(out), queue(workspace, device, stream));
          },
          release())
      .def(
          "cuda_gradient",
          [](const trt::LossSettings& self, Address logits, Address target, Address probabilities,
             Address class_weight, Address log_normalizer, Address divisors, Address upstream,
             Address grad, int device, Address stream) {
            trt::cuda::loss_gradient(
                self,
                loss_tensors(logits, target, probabilities, class_weight, log_normalizer, divisors),
                pointer(upstream), pointer(grad), queue(0, device, stream));
          },
          release())
#endif
      ;

  module.def(
      "cpu_spike_pack",
      [](trt::DType dtype, std::int64_t count, Address x, Address bits, int threads) {
        return trt::cpu::spike_pack(dtype, count, pointer(x), pointer<std::uint8_t>(bits), threads);
      },
      release());
  module.def(
      "cpu_spike_unpack",
      [](trt::DType dtype, Address bits, std::int64_t outer, std::int64_t steps, std::int64_t inner,
         Address to, int threads) {
        trt::cpu::spike_unpack(dtype, {pointer<std::uint8_t>(bits), outer, steps, inner},
                               pointer(to), threads);
      },
      release());
#ifdef TRT_KERNELS_CUDA
  module.def(
      "cuda_spike_pack",
      [](trt::DType dtype, std::int64_t count, Address x, Address bits, Address binary, int device,
         Address stream) {
        trt::cuda::spike_pack(dtype, count, pointer(x), pointer<std::uint8_t>(bits),
                              pointer<std::uint8_t>(binary), queue(0, device, stream));
      },
      release());
  module.def(
      "cuda_spike_unpack",
      [](trt::DType dtype, Address bits, std::int64_t outer, std::int64_t steps, std::int64_t inner,
         Address to, int device, Address stream) {
        trt::cuda::spike_unpack(dtype, {pointer<std::uint8_t>(bits), outer, steps, inner},
                                pointer(to), queue(0, device, stream));
      },
      release());
#endif

  module.def("build_info", &build_info);
  module.def("cpu_levels", &trt::cpu::levels,
             "Instruction-set levels usable on this processor, best last.");
  module.def("cpu_level", &trt::cpu::level);
  module.def("set_cpu_level", &trt::cpu::set_level);
#ifdef TRT_KERNELS_CUDA
  module.def("cuda_why_not", &trt::cuda::why_not);
#endif
  module.def("cuda_devices", [] {
    std::string reason = "compiled without CUDA";
    int count = 0;
#ifdef TRT_KERNELS_CUDA
    count = trt::cuda::device_count(&reason);
#endif
    return std::make_pair(count, reason);
  });
}
