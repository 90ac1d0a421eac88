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


class Leaky(Served):
    """The state stays in the library's buffer `mem`, the potential before its delayed reset."""

    caches = ("_numbers", "_after_reset")

    def _begin(self) -> None:
        self._surrogate()

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        leaky: Any = module
        if "forward" in vars(leaky):
            return "its forward was replaced"
        if leaky.inhibition:
            return "inhibition: got True, needs False"
        if leaky.state_quant:
            return "state_quant: got a function, needs False"
        if not leaky.reset_delay:
            return "reset_delay: got False, needs True"
        if leaky.surrogate_disable:
            return "surrogate_disable: got True, needs False"
        factor = leaky.graded_spikes_factor
        if isinstance(factor, nn.Parameter) or bool((factor != 1).any()):
            return "graded_spikes_factor: got one that is learned or not 1, needs 1"
        for name in ("beta", "threshold"):
            value = getattr(leaky, name)
            if value.ndim > 1:
                return f"{name}: got shape {tuple(value.shape)}, needs a scalar or [features]"
        try:
            our_surrogate(leaky.spike_grad)
        except ValueError as error:
            return str(error)
        return None

    def _has_time(self) -> bool:
        return False

    def _number(self, name: str) -> Any:
        """A fixed scalar as a float, which is faster; read again where it was changed."""
        value: Tensor = getattr(self, name)
        if value.requires_grad or value.numel() != 1 or torch.compiler.is_compiling():
            return value
        kept: dict[str, Any] = self.__dict__.setdefault("_numbers", {})
        known = kept.get(name)
        if known is None or known[0] is not value or known[1] != value._version:
            known = kept[name] = (value, value._version, float(value))
        return known[2]

    def _options(self) -> dict[str, Any]:
        """Those of `lif`, from the attributes as they are now."""
        leaky: Any = self
        beta, threshold = self._number("beta"), self._number("threshold")
        learned = isinstance(beta, Tensor) or isinstance(threshold, Tensor)
        options: dict[str, Any] = (presets.snntorch_leaky if learned else uncached(_preset))(
            beta,
            threshold=threshold,
            reset_mechanism=leaky.reset_mechanism,
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

    def forward(self, input_: Tensor, mem: Tensor | None = None) -> Any:
        leaky: Any = self
        if mem is not None:
            if leaky.init_hidden:
                raise TypeError(
                    "`mem` should not be passed as an argument while `init_hidden=True`"
                )
            leaky.mem = mem
        before, options = leaky.mem, self._options()
        start: Tensor | None = None  # zeros, where mem has another shape
        resets = options["reset"] == "hard"
        if before.shape == input_.shape:
            known = self.__dict__.get("_after_reset")
            if not resets:
                start = before.to(state_dtype(input_.dtype))
            elif known is not None and known[0] is before and known[1] == before._version:
                start = known[2]
            else:  # the reset that the library does at the next step
                start = before.to(state_dtype(input_.dtype))
                start = start.masked_fill(start > options["threshold"], 0)
        out = self._step(input_, start, options, return_potential=resets)
        mem = out.potential if resets else out.state
        if resets:
            self.__dict__["_after_reset"] = (mem, mem._version, out.state)
        if torch.compiler.is_compiling():
            leaky.mem = mem
        else:
            self._buffers["mem"] = mem  # by way of `__setattr__` a step takes longer
        return out.spikes if leaky.init_hidden and not leaky.output else (out.spikes, mem)


SERVED: dict[type[nn.Module], type[Served]] = {snntorch.Leaky: Leaky}


def is_neuron(module: nn.Module) -> bool:
    return isinstance(module, snntorch.SpikingNeuron)


BATCH_NORMS: tuple[type[nn.Module], ...] = ()
CONTAINERS: tuple[type[nn.Module], ...] = ()
