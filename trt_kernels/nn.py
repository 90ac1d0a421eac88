"""Modules over the functions: they hold settings, and a state where asked to."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from . import checks
from .functional import lif
from .ops import check_backend_name
from .options import LIF_SETTINGS, MembranePenalty, make_lif_options

_MOST_DIMENSIONS = 64  # of a torch tensor
_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(lif).parameters.items()
    if parameter.kind is inspect.Parameter.KEYWORD_ONLY
}


class LIF(nn.Module):
    """A layer of leaky integrate-and-fire neurons over all timesteps; see `lif` for the equations.

    Args:
        stateful: carry the membrane potential from call to call, until `reset()`. The state keeps
            its graph: call `detach()` between calls to train by truncated backpropagation.
        lif_options: every keyword argument of `lif`; a stateful layer takes no v_init.

    Forward: x -> spikes, or a `LIFOutput` if the options ask for an extra; differentiable in x. The
    module has no parameters and its state is not part of the state_dict.

    Raises:
        TypeError, ValueError, NotImplementedError: an option that `lif` does not know or refuses.
        What depends on x is raised by the call, as in `lif`; a state whose shape, dtype or device
        does not fit the next x is an error that asks for `reset()`.
    """

    state: Tensor | None

    def __init__(self, *, stateful: bool = False, **lif_options: Any) -> None:
        super().__init__()
        unknown = lif_options.keys() - _DEFAULTS.keys()
        if unknown:
            raise TypeError(
                f"LIF: unknown options {sorted(unknown)}; lif takes {sorted(_DEFAULTS)}"
            )
        self.stateful = checks.boolean("stateful", stateful)
        if stateful and lif_options.get("v_init") is not None:
            raise ValueError("v_init: a stateful layer starts from its own state; call reset()")
        settings = {**_DEFAULTS, **lif_options}
        # Everything but the tensors is checked here, for any backend and number of dimensions.
        ordered = tuple(settings[name] for name in LIF_SETTINGS)
        make_lif_options(ordered, "", 0.0, 0.0, "reference", _MOST_DIMENSIONS, torch.float64)
        penalty = settings["penalty"]
        if penalty is not None and not isinstance(penalty, MembranePenalty):
            raise TypeError(f"penalty: got {type(penalty).__name__}, needs a MembranePenalty")
        if settings["backend"] is not None:
            check_backend_name(settings["backend"])
        self.lif_options = lif_options
        self.state = None

    def forward(self, x: Tensor) -> Any:
        if not self.stateful:
            return lif(x, **self.lif_options)
        try:
            out = lif(x, **{**self.lif_options, "v_init": self.state, "return_state": True})
        except (TypeError, ValueError) as error:
            if str(error).startswith("v_init:"):
                raise ValueError(
                    f"the carried state does not fit this x ({error}); call reset() first"
                ) from error
            raise
        self.state = out.state
        options = self.lif_options
        if options.get("return_potential") or options.get("penalty") is not None:
            return out if options.get("return_state") else out._replace(state=None)
        return out if options.get("return_state") else out.spikes

    def reset(self) -> None:
        """Forgets the state: the next call starts from a potential of 0."""
        self.state = None

    def detach(self) -> None:
        """Cuts the state from its graph, keeping its value."""
        if self.state is not None:
            self.state = self.state.detach()

    def _apply(self, fn: Any, recurse: bool = True) -> "LIF":
        super()._apply(fn, recurse)
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
        # A copy or a pickle takes the state's value; its graph belongs to the original.
        state = self.__dict__.copy()
        if isinstance(state["state"], torch.Tensor):
            state["state"] = state["state"].detach()
        return state

    def extra_repr(self) -> str:
        shown = {**_DEFAULTS, **self.lif_options}
        hidden = {name for name, value in shown.items() if value is None and name != "backend"}
        settings = [f"{name}={value!r}" for name, value in shown.items() if name not in hidden]
        return ", ".join([*settings, f"stateful={self.stateful}"])
