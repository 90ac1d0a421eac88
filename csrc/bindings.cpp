// The Python module `trt_kernels._C`: addresses and sizes in, nothing owned, the GIL released.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

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
                          double eps) {
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
  return settings;
}

// Sizes of a sequence that fills its memory in this order, as [outer][steps][inner].
trt::LIFShape make_shape(trt::DType dtype, const std::vector<std::int64_t>& sizes,
                         std::size_t time_dim) {
  trt::LIFShape shape{dtype, 1, sizes.at(time_dim), 1};
  for (std::size_t dim = 0; dim < time_dim; ++dim) shape.outer *= sizes[dim];
  for (std::size_t dim = time_dim + 1; dim < sizes.size(); ++dim) shape.inner *= sizes[dim];
  return shape;
}

void check_phi(const trt::LIFSettings& settings, Address weight) {
  if (weight && !settings.penalizes())
    throw std::invalid_argument("a penalty's weight needs a phi");
}

trt::LIFForward forward_arguments(const trt::LIFShape& shape, Address x, Address v_init,
                                  Address weight, Address spikes, Address potential, Address state,
                                  Address penalty, Address checkpoints = 0,
                                  int checkpoint_every = 0) {
  return {shape,           pointer(x),       pointer(v_init),
          pointer(weight), pointer(spikes),  pointer(potential),
          pointer(state),  pointer(penalty), pointer(checkpoints),
          checkpoint_every};
}

trt::LIFBackward backward_arguments(const trt::LIFShape& shape, Address x, Address v_init,
                                    Address weight, Address grad_spikes, Address grad_potential,
                                    Address grad_state, Address grad_penalty, Address grad_x,
                                    Address grad_v_init, Address checkpoints = 0,
                                    int checkpoint_every = 0) {
  return {shape,
          pointer(x),
          pointer(v_init),
          pointer(weight),
          pointer(grad_spikes),
          pointer(grad_potential),
          pointer(grad_state),
          pointer(grad_penalty),
          pointer(grad_x),
          pointer(grad_v_init),
          pointer(checkpoints),
          checkpoint_every};
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

  py::class_<trt::LIFSettings>(module, "LIF", py::module_local())
      .def(py::init(&make_lif), py::kw_only(), "charge"_a, "reset"_a, "surrogate"_a, "phi"_a,
           "decay"_a, "tau"_a, "threshold"_a, "v_reset"_a, "detach_reset"_a, "fire_at_threshold"_a,
           "surrogate_parameter"_a, "delta"_a, "eps"_a)
      .def(
          "cpu_forward",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address v_init, Address weight, Address spikes,
             Address potential, Address state, Address penalty, int threads) {
            check_phi(self, weight);
            trt::cpu::lif_forward(self,
                                  forward_arguments(make_shape(dtype, sizes, time_dim), x, v_init,
                                                    weight, spikes, potential, state, penalty),
                                  threads);
          },
          release())
      .def(
          "cpu_backward",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address v_init, Address weight, Address grad_spikes,
             Address grad_potential, Address grad_state, Address grad_penalty, Address grad_x,
             Address grad_v_init, int threads) {
            trt::cpu::lif_backward(
                self,
                backward_arguments(make_shape(dtype, sizes, time_dim), x, v_init, weight,
                                   grad_spikes, grad_potential, grad_state, grad_penalty, grad_x,
                                   grad_v_init),
                threads);
          },
          release())
#ifdef TRT_KERNELS_CUDA
      .def("cuda_forward_workspace",
           [](const trt::LIFSettings& self, trt::DType dtype,
              const std::vector<std::int64_t>& sizes, std::size_t time_dim) {
             return trt::cuda::lif_forward_workspace(self, make_shape(dtype, sizes, time_dim));
           })
      .def("cuda_backward_workspace",
           [](const trt::LIFSettings& self, trt::DType dtype,
              const std::vector<std::int64_t>& sizes, std::size_t time_dim) {
             return trt::cuda::lif_backward_workspace(self, make_shape(dtype, sizes, time_dim));
           })
      .def(
          "cuda_forward",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address v_init, Address weight, Address spikes,
             Address potential, Address state, Address penalty, Address checkpoints,
             int checkpoint_every, Address workspace, int device, Address stream) {
            check_phi(self, weight);
            trt::cuda::lif_forward(
                self,
                forward_arguments(make_shape(dtype, sizes, time_dim), x, v_init, weight, spikes,
                                  potential, state, penalty, checkpoints, checkpoint_every),
                queue(workspace, device, stream));
          },
          release())
      .def(
          "cuda_backward",
          [](const trt::LIFSettings& self, trt::DType dtype, const std::vector<std::int64_t>& sizes,
             std::size_t time_dim, Address x, Address v_init, Address weight, Address grad_spikes,
             Address grad_potential, Address grad_state, Address grad_penalty, Address grad_x,
             Address grad_v_init, Address checkpoints, int checkpoint_every, Address workspace,
             int device, Address stream) {
            trt::cuda::lif_backward(
                self,
                backward_arguments(make_shape(dtype, sizes, time_dim), x, v_init, weight,
                                   grad_spikes, grad_potential, grad_state, grad_penalty, grad_x,
                                   grad_v_init, checkpoints, checkpoint_every),
                queue(workspace, device, stream));
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
