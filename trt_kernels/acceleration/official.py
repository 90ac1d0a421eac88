"""The LIFNode of the official TRT code, wherever its users have put it.

That code is no package: a class counts as its LIFNode if it has that name and its attributes, and
on a small input gives the same spikes and gradients as `lif`.
"""

import copy
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .. import presets
from ..functional import lif
from .served import Served, uncached

_ATTRIBUTES = ("v_threshold", "v_reset", "tau", "surrogate_type", "surrogate_param")
_preset = lru_cache(maxsize=256)(presets.official_trt)


def is_neuron(module: nn.Module) -> bool:
    named = type(module).__name__ == "LIFNode"
    return named and all(hasattr(module, name) for name in _ATTRIBUTES)


class LIFNode(Served):
    """Every call starts from a potential of 0, as there."""

    @staticmethod
    def _options(node: Any) -> dict[str, Any]:
        options: dict[str, Any] = uncached(_preset)(
            **{name: getattr(node, name) for name in _ATTRIBUTES}
        )
        return options

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        try:
            options = cls._options(module)
        except (TypeError, ValueError) as error:
            return str(error)
        probe = copy.copy(module)  # its attributes are left as they are
        vars(probe).update({name: {} for name in vars(module) if name.endswith("_hooks")})
        x = torch.linspace(-1, 2, 96, dtype=torch.float32, device="cpu").view(2, 6, 8)
        with torch.inference_mode(False), torch.enable_grad():
            x = x.clone().requires_grad_()
            ours = lif(x, **options, backend="cpu")
            (own,) = torch.autograd.grad(ours.sum(), x)
            try:
                spikes = probe(x)
                (theirs,) = torch.autograd.grad(spikes.sum(), x)
            except Exception as error:  # whatever somebody else's code raises
                return f"its forward fails on a small input: {type(error).__name__}: {error}"
        if not torch.equal(spikes, ours):
            return "it does not give the spikes of the official LIFNode"
        if not torch.allclose(own, theirs, rtol=1e-4, atol=1e-6):
            return "it does not have the gradients of the official LIFNode"
        return None

    def _has_time(self) -> bool:
        return True

    def forward(self, X: Tensor) -> Tensor:
        spikes: Tensor = self._lif(X, **self._options(self))
        return spikes


BATCH_NORMS: tuple[type[nn.Module], ...] = ()
CONTAINERS: tuple[type[nn.Module], ...] = ()
