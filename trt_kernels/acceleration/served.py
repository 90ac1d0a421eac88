"""How a module of another library is served by `lif`: its class becomes a subclass of its own.

So isinstance, parameters, buffers, names and the library's helpers stay what they are, and the way
back is to give the class back.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..functional import batch_norm_lif, lif, lif_step, single
from ..nn import batch_norm_arguments, count_batch


class Served(nn.Module):
    """Base of what a neuron's class is mixed with."""

    original: ClassVar[type[nn.Module]]  # the class of the library
    mixin: ClassVar[type[nn.Module]]
    caches: ClassVar[tuple[str, ...]] = ()  # attributes that the library's class does without
    # The BatchNorm that is done together with this neuron, in a tuple: it stays where it was.
    _joined: tuple["Deferred"] | None = None

    @classmethod
    def why_not(cls, module: nn.Module) -> str | None:
        """The setting that prevents a module of the library's class to be served, or None."""
        raise NotImplementedError

    def _begin(self) -> None:
        """What is prepared as the class is given, for torch.compile, which could not trace it."""

    def _lif(self, x: Tensor, *, time_dim: int = 0, **options: Any) -> Any:
        """`lif` of x, with the joined BatchNorm before it."""
        if self._joined is None:
            return lif(x, time_dim=time_dim, **options)
        (norm,) = self._joined
        norm.give(self)
        out = batch_norm_lif(x, *batch_norm_arguments(norm), time_dim=time_dim, **options)
        count_batch(norm)
        return out

    def _step(
        self,
        x: Tensor,
        v: Tensor | None,
        options: dict[str, Any],
        return_potential: bool = False,
    ) -> Any:
        """`lif_step`, with the joined BatchNorm before it."""
        if self._joined is None:
            return lif_step(x, v, options, return_potential=return_potential)
        more = {"v_init": v, "return_state": True, "return_potential": return_potential}
        return single(self._lif(x.unsqueeze(0), **{**options, **more}))

    def _has_time(self) -> bool:
        """Whether x has timesteps, and is not of a single one."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        joined = ", with the BatchNorm before it" if self._joined is not None else ""
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}served by trt_kernels{joined}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made at run time, so a pickle names what it is made of.
        state: Any = super().__reduce_ex__(2)[2]
        return _new, (self.mixin, self.original), state


class Deferred(Served):
    """A BatchNorm whose work the neuron after it does: it passes its input on."""

    _waits: bool | None = None  # whether gradients were recorded, until the neuron has come
    in_steps = False  # it is given [T·B, C, *], between a flattening of time and its way back

    def forward(self, x: Tensor) -> Tensor:
        if self._waits is not None:
            self._waits = None
            raise RuntimeError(
                "a BatchNorm that accelerate joined with a neuron was called, and then its neuron "
                "was not: restore(model), and leave fuse_batch_norm out. (After an interrupted "
                "forward pass, call it again.)"
            )
        self._waits = torch.is_grad_enabled()
        return x

    def give(self, neuron: Served) -> None:
        """Lets the neuron do the work, once."""
        waited, self._waits = self._waits, None
        if waited is None:
            raise RuntimeError(
                "a neuron was called without the BatchNorm that accelerate joined it with (or in a "
                "replica of nn.DataParallel): restore(model), and leave fuse_batch_norm out"
            )
        if waited != torch.is_grad_enabled():
            raise RuntimeError(
                "a BatchNorm under no_grad and the neuron joined with it are not: restore(model), "
                "and leave fuse_batch_norm out"
            )
        has_time = self.in_steps or getattr(self, "step_mode", "s") == "m"
        if has_time != neuron._has_time():
            raise RuntimeError(
                "step_mode: a neuron and the BatchNorm joined with it are in different step modes"
            )


def uncached(function: Any) -> Any:
    """What an `lru_cache` wraps, under torch.compile, which traces no cache."""
    return function.__wrapped__ if torch.compiler.is_compiling() else function


_classes: dict[tuple[Any, Any], Any] = {}


def served_class(mixin: Any, original: Any) -> Any:
    """The subclass of `original` that a served module has: always the same one."""
    if (mixin, original) not in _classes:
        names = {"__module__": original.__module__, "__doc__": original.__doc__}
        _classes[mixin, original] = type(
            original.__name__, (mixin, original), {**names, "original": original, "mixin": mixin}
        )
    return _classes[mixin, original]


def _new(mixin: Any, original: Any) -> Any:
    kind = served_class(mixin, original)
    return kind.__new__(kind)
