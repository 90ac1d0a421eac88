"""Modules over the functions: they hold settings, parameters, and a state where asked to."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from . import checks
from .functional import LIF_DEFAULTS, batch_norm_lif, lif
from .ops import check_backend_name
from .options import LEARNABLE, LIF_SETTINGS, MembranePenalty, make_lif_options

_in_backward = torch._C._current_graph_task_id  # -1 outside of a backward pass
_MOST_DIMENSIONS = 64  # of a torch tensor


def in_graph(state: Tensor) -> Tensor:
    """A state that a graph may keep, also one made under inference_mode."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return state
    return state.clone() if state.is_inference() else state


class _Neuron(nn.Module):
    """The options of `lif` and a state between calls, for the modules below."""

    state: Tensor | None

    def _set_options(self, stateful: bool, lif_options: dict[str, Any]) -> None:
        name = type(self).__name__
        unknown = lif_options.keys() - LIF_DEFAULTS.keys()
        if unknown:
            raise TypeError(
                f"{name}: unknown options {sorted(unknown)}; lif takes {sorted(LIF_DEFAULTS)}"
            )
        self.stateful = checks.boolean("stateful", stateful)
        if stateful and isinstance(lif_options.get("v_init"), Tensor):
            raise ValueError("v_init: a stateful layer starts from a float, or from its own state")
        settings = {**LIF_DEFAULTS, **lif_options}
        if settings["v_init"] is not None and not isinstance(settings["v_init"], Tensor):
            checks.finite("v_init", settings["v_init"])
        for key in LEARNABLE:
            value = settings[key]
            if isinstance(value, Tensor):
                checks.tensor(key, value)
                if value.ndim > 1:
                    raise ValueError(
                        f"{key}: got shape {tuple(value.shape)}, needs a scalar or [C]"
                    )
                if isinstance(value, nn.Parameter):
                    self.register_parameter(key, value)
                else:
                    self.register_buffer(key, value)
                settings[key] = LIF_DEFAULTS[key]
        # Everything but the tensors is checked here, for any backend and number of dimensions.
        ordered = tuple(settings[key] for key in LIF_SETTINGS)
        penalty = settings["penalty"]
        if penalty is not None and not isinstance(penalty, MembranePenalty):
            raise TypeError(f"penalty: got {type(penalty).__name__}, needs a MembranePenalty")
        phi = "" if penalty is None else penalty.phi
        backend = "reference" if settings["memory"] != "bits" else "cpu"
        make_lif_options(ordered, phi, 0.0, 0.0, backend, _MOST_DIMENSIONS, torch.float64)
        if settings["backend"] is not None:
            check_backend_name(settings["backend"])
        self.lif_options = {
            key: value
            for key, value in lif_options.items()
            if not (key in LEARNABLE and isinstance(value, Tensor))
        }
        self.state = None

    def _options(self) -> dict[str, Any]:
        """The options of a call: settings, and what is learned."""
        learned = {key: getattr(self, key) for key in LEARNABLE if hasattr(self, key)}
        return {**self.lif_options, **learned}

    def _run(self, function: Any, *arguments: Any, **options: Any) -> Any:
        """A call of `lif`, or of a function like it, with the state carried where asked to."""
        if not self.stateful:
            return function(*arguments, **options)
        if self.state is not None and not torch.compiler.is_compiling() and _in_backward() != -1:
            raise RuntimeError(
                "state: a stateful layer was called again within a backward pass, as "
                "torch.utils.checkpoint does, and would go on from a later state than it did: "
                "leave it out of what is checkpointed, or call reset() at the start of that"
            )
        try:
            if self.state is not None:
                options = {**options, "v_init": in_graph(self.state)}
            out = function(*arguments, **{**options, "return_state": True})
        except (TypeError, ValueError) as error:
            if str(error).startswith("v_init:"):
                raise ValueError(
                    f"the carried state does not fit this x ({error}); call reset() first"
                ) from error
            raise
        self.state = out.state
        kept = options.get("return_state")
        asked = ("return_potential", "statistics")
        if any(options.get(key) for key in asked) or options.get("penalty") is not None:
            return out if kept else out._replace(state=None)
        return out if kept else out.spikes

    def reset(self) -> None:
        """Forgets the state: the next call starts from the option v_init, or a potential of 0."""
        self.state = None

    def detach(self) -> None:
        """Cuts the state from its graph, keeping its value."""
        if self.state is not None:
            self.state = self.state.detach()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.state is not None:
            # Moves with the module, but keeps its own dtype, as `lif` demands.
            self.state = self.state.to(fn(self.state).device)
        penalty = self.lif_options.get("penalty")
        if isinstance(penalty, MembranePenalty):
            moved = penalty.weight.to(fn(penalty.weight).device)
            self.lif_options["penalty"] = MembranePenalty(
                penalty.phi, moved, delta=penalty.delta, eps=penalty.eps
            )
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or a pickle takes the values of tensors; a graph belongs to the original.
        state = self.__dict__.copy()
        if isinstance(state["state"], torch.Tensor):
            state["state"] = state["state"].detach()
        for kept in ("_buffers", "lif_options"):
            if any(isinstance(t, Tensor) and t.grad_fn is not None for t in state[kept].values()):
                state[kept] = {
                    name: t.detach() if isinstance(t, Tensor) else t
                    for name, t in state[kept].items()
                }
        return state

    def extra_repr(self) -> str:
        shown = {**LIF_DEFAULTS, **self._options()}
        hidden = {name for name, value in shown.items() if value is None and name != "backend"}
        settings = [
            f"{name}={tuple(value.shape) if isinstance(value, Tensor) else repr(value)}"
            for name, value in shown.items()
            if name not in hidden
        ]
        return ", ".join([*settings, f"stateful={self.stateful}"])


class LIF(_Neuron):
    """A layer of leaky integrate-and-fire neurons over all timesteps; see `lif` for the equations.

    Args:
        stateful: carry the membrane potential from call to call, until `reset()`. The state keeps
            its graph: call `detach()` between calls to train by truncated backpropagation.
        lif_options: every keyword argument of `lif`; the v_init of a stateful layer is a float. A
            Parameter among decay, threshold and v_reset becomes one of the module, under that name,
            and any other tensor a buffer.

    Forward: x -> spikes, or a `LIFOutput` if the options ask for an extra; differentiable in x and
    in the parameters. The state is not part of the state_dict.

    Raises:
        TypeError, ValueError: an option that `lif` does not know or refuses. What depends on x is
            raised by the call, as in `lif`; a state whose shape, dtype or device does not fit the
            next x is an error that asks for `reset()`.
    """

    def __init__(self, *, stateful: bool = False, **lif_options: Any) -> None:
        super().__init__()
        self._set_options(stateful, lif_options)

    def forward(self, x: Tensor) -> Any:
        return self._run(lif, x, **self._options())


class PLIF(_Neuron):
    """A layer of LIF neurons that learn their time constant: 1/τ = sigmoid(w).

        h_t = v_{t-1} + (x_t - (v_{t-1} - v_reset))·sigmoid(w)      with decay_input
        h_t = v_{t-1} - (v_{t-1} - v_reset)·sigmoid(w) + x_t        without

    Args:
        init_tau: τ at the start, > 1.
        decay_input: the input is weighted by 1/τ too.
        channels: a w for each of so many channels of `channel_dim`; one for all if not given.
        stateful, lif_options: as in `LIF`, without decay and charge.

    Forward: as in `LIF`. The parameter is `w`, a scalar or [channels].

    Raises: as `LIF`; an option that this neuron sets itself.

    Source: Fang et al., ICCV 2021 (arXiv 2007.05785); SpikingJelly's ParametricLIFNode.
    """

    def __init__(
        self,
        init_tau: float = 2.0,
        *,
        decay_input: bool = True,
        channels: int | None = None,
        stateful: bool = False,
        **lif_options: Any,
    ) -> None:
        super().__init__()
        for key in ("decay", "charge"):
            if key in lif_options:
                raise TypeError(f"{key}: PLIF learns it: give init_tau and decay_input instead")
        init_tau = checks.finite("init_tau", init_tau)
        if init_tau <= 1:
            raise ValueError(f"init_tau: got {init_tau}, needs a number > 1")
        self.decay_input = checks.boolean("decay_input", decay_input)
        shape: tuple[int, ...] = ()
        if channels is not None:
            if checks.integer("channels", channels) < 1:
                raise ValueError(f"channels: got {channels}, needs at least 1")
            if lif_options.get("channel_dim") is None:
                raise ValueError("channel_dim: got None, needed beside channels")
            shape = (channels,)
        if lif_options.get("memory", "recompute") == "bits":
            raise ValueError("memory: 'bits' has no gradient for a decay, which PLIF learns")
        charge = "leak" if self.decay_input else "rest"
        self._set_options(stateful, {**lif_options, "charge": charge})
        self.w = nn.Parameter(torch.full(shape, -math.log(init_tau - 1)))

    def forward(self, x: Tensor) -> Any:
        return self._run(lif, x, **{**self._options(), "decay": self.w.sigmoid()})

    def extra_repr(self) -> str:
        return f"decay_input={self.decay_input}, {super().extra_repr()}"


def batch_norm_arguments(norm: Any) -> tuple[Any, ...]:
    """What `batch_norm_lif` takes after x, of a module like torch's BatchNorm, at a call."""
    momentum: float | Tensor = 0.0 if norm.momentum is None else norm.momentum
    training = norm.training or norm.running_mean is None
    updates = norm.training and norm.track_running_stats
    if updates and norm.num_batches_tracked is not None and norm.momentum is None:
        # The average over all batches, this one among them. A tensor: a float would synchronise
        # with a GPU, and could not be compiled.
        momentum = 1 / (norm.num_batches_tracked + 1).double()
    running = not training or updates
    return (
        norm.running_mean if running else None,
        norm.running_var if running else None,
        norm.weight,
        norm.bias,
        training,
        momentum,
        norm.eps,
    )


def count_batch(norm: Any) -> None:
    """Counts a batch that a module like torch's BatchNorm has normalised; not one that raised."""
    if norm.training and norm.track_running_stats and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)


class BatchNormLIF(_Neuron, _NormBase):
    """Batch normalisation and LIF neurons in one operator; see `batch_norm_lif`.

    In the place of a `torch.nn.BatchNorm2d` (over time and batch together) and a `LIF`: parameters
    and buffers have the names of BatchNorm2d, so that its state_dict loads.

    Args:
        num_features: C.
        eps, momentum, affine, track_running_stats: as in BatchNorm2d; a momentum of None averages.
        time_dim: 0 for x [T, B, C, *], 1 for [B, T, C, *].
        scale: a factor of the normalised x, α·threshold for tdBN.
        gain_steps: learn a gain for each of so many timesteps, [T], 1 at the start (TEBN); None for
            no gains.
        gains_by_channel: a gain for each step and channel, [T, C].
        process_group: share the statistics over this group of `torch.distributed` in training.
        stateful, lif_options: as in `LIF`.

    Forward: x [T, B, C, *] -> spikes of its shape, or a `LIFOutput`; with the option `steps`, x has
    no time.

    Raises: as `batch_norm_lif` and `LIF`.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        time_dim: int = 0,
        scale: float = 1.0,
        gain_steps: int | None = None,
        gains_by_channel: bool = False,
        process_group: Any = None,
        stateful: bool = False,
        device: Any = None,
        dtype: Any = None,
        **lif_options: Any,
    ) -> None:
        if checks.integer("num_features", num_features) < 1:
            raise ValueError(f"num_features: got {num_features}, needs at least 1")
        eps = checks.positive("eps", eps)
        if momentum is not None:
            momentum = checks.fraction("momentum", momentum)
        _NormBase.__init__(
            self, num_features, eps, momentum, affine, track_running_stats, device, dtype
        )
        self._set_options(stateful, {**lif_options, "time_dim": time_dim})
        if lif_options.get("memory", "recompute") == "bits":
            raise ValueError("memory: 'bits' is not for BatchNormLIF, whose backward pass needs x")
        self.scale = checks.finite("scale", scale)
        self.process_group = process_group
        self.gains: nn.Parameter | None = None
        if gain_steps is not None:
            steps = checks.steps(gain_steps)
            shape = (steps, num_features) if gains_by_channel else (steps,)
            self.gains = nn.Parameter(torch.ones(shape, device=device, dtype=dtype))
        elif gains_by_channel:
            raise ValueError("gains_by_channel: needs gain_steps")

    def forward(self, x: Tensor) -> Any:
        options = self._options()
        out = self._run(
            batch_norm_lif,
            x,
            *batch_norm_arguments(self),
            scale=self.scale,
            gains=self.gains,
            process_group=self.process_group,
            **options,
        )
        count_batch(self)
        return out

    def extra_repr(self) -> str:
        norm = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}, scale={self.scale}"
        )
        return f"{norm}, {_Neuron.extra_repr(self)}"
