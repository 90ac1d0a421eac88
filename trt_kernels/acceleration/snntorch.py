"""snnTorch 1.0's Leaky; needs snnTorch."""

import inspect
from functools import lru_cache
from typing import Any

import snntorch
import torch
from snntorch import surrogate
from torch import Tensor, nn

from .. import presets
from ..checks import state_dtype
from ..nn import in_graph
from ..surrogates import ATan, FastSigmoid, Sigmoid, SignedStep, Surrogate
from .served import Served, uncached

# A surrogate of snnTorch is a function made by another, of whose argument it is a closure.
_SURROGATES: dict[str, tuple[str, Any]] = {
    "atan": ("alpha", ATan),
    "fast_sigmoid": ("slope", FastSigmoid),
    "sigmoid": ("slope", Sigmoid),
    "triangular": ("threshold", SignedStep),
}
_preset = lru_cache(maxsize=256)(presets.snntorch_leaky)


def our_surrogate(theirs: Any) -> Surrogate:
    """The same surrogate for `lif`, or a ValueError that says what prevents it."""
    own = getattr(theirs, "__module__", None) == surrogate.__name__
    maker = theirs.__qualname__.split(".")[0] if own else repr(theirs)
    if maker not in _SURROGATES:
        names = ", ".join(_SURROGATES)
        raise ValueError(f"spike_grad: got {maker}, needs one of snntorch.surrogate's {names}")
    name, kind = _SURROGATES[maker]
    value = inspect.getclosurevars(theirs).nonlocals[name]
    if isinstance(value, Tensor):
        raise ValueError(f"spike_grad: the {name} of {maker} is a tensor, needs a number")
    ours: Surrogate = kind(value)
    return ours


# What the library's `forward` calls, and its name in the constructor.
_RESETS = {"_base_sub": "subtract", "_base_zero": "zero", "_base_int": "none"}
# Settings that `lif` does not have, and the value that switches each off.
_OFF = {"inhibition": False, "state_quant": False, "reset_delay": True, "surrogate_disable": False}


def _unserved(leaky: Any) -> str | None:
    """The setting that prevents serving, of those that are looked at every call."""
    for name, off in _OFF.items():
        value = getattr(leaky, name)
        if bool(value) != off:
            return f"{name}: got {value!r}, needs {off}"
    return None


class Leaky(Served):
    """The state stays in the library's buffer `mem`, the potential before its delayed reset.

    On a GPU beta and threshold are read once, to synchronise nothing, and again where they are
    other tensors or were changed in place: a change through `.data` is not seen there.
    """

    caches = ("_numbers", "_our_surrogate")

    def _begin(self) -> None:
        self._surrogate()

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        leaky: Any = module
        if "forward" in vars(leaky):
            return "its forward was replaced"
        reason = _unserved(leaky)
        if reason is not None:
            return reason
        factor = leaky.graded_spikes_factor
        if isinstance(factor, nn.Parameter) or bool((factor != 1).any()):
            return "graded_spikes_factor: got one that is learned or not 1, needs 1"
        for name in ("beta", "threshold"):
            value = getattr(leaky, name)
            if value.ndim > 1:
                return f"{name}: got shape {tuple(value.shape)}, needs a scalar or [features]"
            if value.ndim and value.dtype not in (torch.float32, torch.float64):
                return f"{name}: got dtype {value.dtype}, needs a float32 vector, or a scalar"
        try:
            our_surrogate(leaky.spike_grad)
        except ValueError as error:
            return str(error)
        return None

    def _has_time(self) -> bool:
        return False

    def _number(self, name: str) -> Any:
        """A fixed scalar as a float, which is faster."""
        value: Tensor = getattr(self, name)
        if value.requires_grad or value.numel() != 1 or torch.compiler.is_compiling():
            return value
        if value.device.type == "cpu":
            return float(value)
        kept: dict[str, Any] = self.__dict__.setdefault("_numbers", {})
        state = value.data_ptr(), None if value.is_inference() else value._version
        known = kept.get(name)
        if known is None or known[0] is not value or known[1] != state:
            known = kept[name] = (value, state, float(value))
        return known[2]

    def _options(self) -> dict[str, Any]:
        """Those of `lif`, from the attributes as they are now."""
        leaky: Any = self
        reason = _unserved(leaky)
        if reason is None and not torch.compiler.is_compiling():
            factor = self._number("graded_spikes_factor")
            if factor != 1:
                reason = f"graded_spikes_factor: got {factor}, needs 1"
        if reason is not None:
            raise ValueError(f"{reason}: restore(model) for the library's own neuron")
        beta, threshold = self._number("beta"), self._number("threshold")
        learned = isinstance(beta, Tensor) or isinstance(threshold, Tensor)
        options: dict[str, Any] = (presets.snntorch_leaky if learned else uncached(_preset))(
            beta,
            threshold=threshold,
            reset_mechanism=_RESETS[leaky.state_function.__name__],
            surrogate=self._surrogate(),
        )
        by_feature = any(isinstance(v, Tensor) and v.numel() > 1 for v in (beta, threshold))
        return {**options, "channel_dim": -1} if by_feature else options

    def _surrogate(self) -> Surrogate:
        theirs = self.spike_grad
        known = self.__dict__.get("_our_surrogate")
        if known is None or known[0] is not theirs:
            known = self.__dict__["_our_surrogate"] = (theirs, our_surrogate(theirs))
        ours: Surrogate = known[1]
        return ours

    def _start(self, x: Tensor, options: dict[str, Any]) -> Tensor | None:
        """The potential before this step, after the reset of the step before; None for zeros."""
        leaky: Any = self
        before, dtype = leaky.mem, state_dtype(x.dtype)
        if before.shape != x.shape:  # another batch: from zeros, as the library
            return None
        for name in ("mem", "beta", "threshold"):
            value = getattr(leaky, name)
            if value.ndim and value.dtype == torch.float64 != dtype:
                raise ValueError(f"{name}: got dtype torch.float64, needs {dtype} beside this x")
        start = in_graph(before.to(dtype))
        if options["reset"] == "hard":
            start = start.masked_fill(start > options["threshold"], 0)
        return start

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        leaky: Any = self
        if mem is not None:
            if leaky.init_hidden:
                raise TypeError(
                    "`mem` should not be passed as an argument while `init_hidden=True`"
                )
            leaky.mem = mem
        options = self._options()
        resets = options["reset"] == "hard"  # then the state is after the reset, and mem before it
        out = self._step(input_, self._start(input_, options), options, return_potential=resets)
        mem = out.potential if resets else out.state
        if torch.compiler.is_compiling():
            leaky.mem = mem
        else:
            self._buffers["mem"] = mem  # by way of `__setattr__` a step takes longer
        spikes = out.spikes.float()  # whatever x is, as the library's
        return spikes if leaky.init_hidden and not leaky.output else (spikes, mem)


SERVED: dict[type[nn.Module], type[Served]] = {snntorch.Leaky: Leaky}


def is_neuron(module: nn.Module) -> bool:
    return isinstance(module, snntorch.SpikingNeuron)


BATCH_NORMS: tuple[type[nn.Module], ...] = ()
CONTAINERS: tuple[type[nn.Module], ...] = ()
