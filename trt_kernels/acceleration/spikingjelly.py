"""SpikingJelly 2.0's IFNode, LIFNode and ParametricLIFNode; needs SpikingJelly."""

from functools import lru_cache
from typing import Any, ClassVar

import torch
from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor, nn

from .. import presets
from ..checks import state_dtype
from ..nn import in_graph
from ..surrogates import ATan, Rectangle, Sigmoid, Surrogate, Triangle
from .served import Served, uncached

# A surrogate as one of ours, from the parameters of the library's.
_SURROGATES: dict[type, Any] = {
    surrogate.Sigmoid: lambda alpha: Sigmoid(alpha),
    surrogate.ATan: lambda alpha: ATan(alpha),
    surrogate.PiecewiseQuadratic: lambda alpha: Triangle(1 / alpha),
    surrogate.Rect: lambda alpha: Rectangle(1 / alpha),
    surrogate.PiecewiseLeakyReLU: lambda w, c: Rectangle(2 * w),
}


def our_surrogate(theirs: Any) -> Surrogate:
    """The same surrogate for `lif`, or a ValueError that says what prevents it."""
    kind: Any = type(theirs)
    if kind not in _SURROGATES:
        names = ", ".join(known.__name__ for known in _SURROGATES)
        raise ValueError(f"surrogate_function: got {kind.__name__}, needs one of {names}")
    if not theirs.spiking:
        raise ValueError("surrogate_function: its spiking is False, needs True")
    ours: Surrogate = uncached(_converted)(kind, tuple(theirs._sg_params.values()))
    return ours


@lru_cache(maxsize=256)
def _converted(kind: Any, parameters: tuple[Any, ...]) -> Surrogate:
    if any(isinstance(value, Tensor) for value in parameters):
        raise ValueError("surrogate_function: its parameter is a tensor, needs a number")
    if kind is surrogate.PiecewiseLeakyReLU and parameters[1] != 0:
        raise ValueError("surrogate_function: got PiecewiseLeakyReLU with c != 0, needs c = 0")
    ours: Surrogate = _SURROGATES[kind](*parameters)
    return ours


@lru_cache(maxsize=256)
def _preset(name: str, **settings: Any) -> dict[str, Any]:
    """A preset but for where it starts, which is known at the call."""
    options: dict[str, Any] = getattr(presets, f"spikingjelly_{name}")(**settings)
    del options["v_init"]
    return options


class _Node(Served):
    """The state stays in the library's memory `v`, so that its reset and detach find it."""

    preset: ClassVar[str]
    own: ClassVar[tuple[str, ...]] = ()  # attributes that this preset takes beside the common ones

    @classmethod
    def _options(cls, node: Any) -> dict[str, Any]:
        """Those of `lif`, from the attributes as they are now."""
        if node._neuron_precision is not None:
            raise ValueError("its precision is set, which lif does not know")
        options: dict[str, Any] = uncached(_preset)(
            cls.preset,
            v_threshold=node.v_threshold,
            v_reset=node.v_reset,
            detach_reset=node.detach_reset,
            surrogate=our_surrogate(node.surrogate_function),
            **{name: getattr(node, name) for name in cls.own},
        )
        return options

    def _learned(self) -> dict[str, Any]:
        return {}

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        node: Any = module
        if "forward" in vars(node):
            return "its forward was replaced"
        try:
            cls._options(node)
        except (TypeError, ValueError) as error:
            return str(error)
        return None

    def _has_time(self) -> bool:
        node: Any = self
        return bool(node.step_mode == "m")

    def _start(self, x: Tensor) -> Tensor | float:
        """The potential before the first step, for x of one step."""
        node: Any = self
        v = node._memories["v"]
        if not isinstance(v, Tensor):
            return float(v)
        if v.shape != x.shape:  # another batch: from the start again, as the library
            return 0.0 if node.v_reset is None else float(node.v_reset)
        return in_graph(v.to(x.device, state_dtype(x.dtype)))

    def functional_forward(self, *arguments: Any, **options: Any) -> Any:
        if self._joined is not None:
            raise RuntimeError(
                "functional_forward: the library's own step does not know the BatchNorm that this "
                "neuron is joined with: restore(model), and leave fuse_batch_norm out"
            )
        library: Any = super()
        return library.functional_forward(*arguments, **options)

    def multi_step_forward(self, x_seq: Tensor) -> Tensor:
        node: Any = self
        options = {**self._options(self), **self._learned(), "v_init": self._start(x_seq[0])}
        out = self._lif(
            x_seq, **options, return_state=True, return_potential=bool(node.store_v_seq)
        )
        node._memories["v"] = out.state
        if node.store_v_seq:
            node.v_seq = self._after_reset(out.potential, out.spikes)
        spikes: Tensor = out.spikes
        return spikes

    def single_step_forward(self, x: Tensor) -> Tensor:
        node: Any = self
        options, start = self._options(self), self._start(x)
        v = None
        if isinstance(start, Tensor):
            v = start
        elif start:
            v = torch.full_like(x, start, dtype=state_dtype(x.dtype))
        learned = self._learned()
        out = self._step(x, v, {**options, **learned} if learned else options)
        node._memories["v"] = out.state
        if node.store_v_seq:
            node._append_v_seq(node.v)
        spikes: Tensor = out.spikes
        return spikes

    def _after_reset(self, h: Tensor, spikes: Tensor) -> Tensor:
        """The potentials after the reset, which the library keeps as `v_seq`."""
        node: Any = self
        s = (spikes.detach() if node.detach_reset else spikes).to(h.dtype)
        if node.v_reset is None:
            after: Tensor = h - s * node.v_threshold
        else:
            after = s * node.v_reset + (1.0 - s) * h
        return after


class IFNode(_Node):
    preset = "if"


class LIFNode(_Node):
    preset, own = "lif", ("tau", "decay_input")


class ParametricLIFNode(_Node):
    preset, own = "plif", ("decay_input",)

    def _learned(self) -> dict[str, Any]:
        node: Any = self
        return {"decay": node.w.float().sigmoid()}


SERVED: dict[type[nn.Module], type[Served]] = {
    neuron.IFNode: IFNode,
    neuron.LIFNode: LIFNode,
    neuron.ParametricLIFNode: ParametricLIFNode,
}


def is_neuron(module: nn.Module) -> bool:
    known = (neuron.BaseNode, neuron.SimpleBaseNode, neuron.NonSpikingBaseNode)
    return isinstance(module, known)


# Those that see all timesteps at once in step mode "m", and what flattens them for its layers.
BATCH_NORMS: tuple[type[nn.Module], ...] = (
    layer.BatchNorm1d,
    layer.BatchNorm2d,
    layer.BatchNorm3d,
)
CONTAINERS: tuple[type[nn.Module], ...] = (layer.SeqToANNContainer,)
