"""`accelerate(model)`: the neurons of a network of another library, served by the kernels here."""

import copy
import sys
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from torch import nn

from .. import checks
from . import official
from .fusion import find_pairs
from .served import Deferred, Served, served_class

__all__ = ["AccelerationReport", "accelerate", "restore"]

# Import name of a library: its own name, and the version whose neurons are known bit for bit.
_LIBRARIES = {"spikingjelly": ("SpikingJelly", "2.0"), "snntorch": ("snnTorch", "1.0")}


@dataclass
class AccelerationReport:
    """What `accelerate` did, by module name. `print` it."""

    model: nn.Module  # the accelerated one
    replaced: dict[str, str] = field(default_factory=dict)  # what serves the neuron
    joined: dict[str, str] = field(default_factory=dict)  # BatchNorm: the neuron it is joined with
    left: dict[str, str] = field(default_factory=dict)  # neurons, with the reason
    not_joined: dict[str, str] = field(default_factory=dict)  # BatchNorms, with the reason

    def __str__(self) -> str:
        lines = [
            f"{len(self.replaced)} neurons served by trt_kernels, {len(self.left)} left; "
            f"{len(self.joined)} BatchNorms joined with the neuron after them"
        ]
        for mark, found in (
            ("served", self.replaced),
            ("LEFT", self.left),
            ("joined with", self.joined),
            ("not joined", self.not_joined),
        ):
            lines += [f"  {name or '(the model itself)'}: {mark}: {v}" for name, v in found.items()]
        return "\n".join(lines)


def _libraries() -> tuple[list[Any], list[tuple[ModuleType, str]]]:
    """What serves the libraries that this process uses, and those of an unknown version."""
    known: list[Any] = [official]
    unknown = []
    for name, (title, wanted) in _LIBRARIES.items():
        if name not in sys.modules:
            continue
        try:
            found = version(name)
        except PackageNotFoundError:
            found = "without a version"
        if found == wanted or found.startswith(wanted + "."):
            known.append(import_module(f"{__name__}.{name}"))
        else:
            reason = f"{title} {found} is not known bit for bit, {title} {wanted} is"
            unknown.append((sys.modules[name], reason))
    return known, unknown


def _why_left(module: nn.Module, libraries: Any, unknown: Any) -> tuple[Any, str]:
    """What can serve a module, or why nothing can; empty where it is no neuron."""
    for library in libraries:
        if not library.is_neuron(module):
            continue
        kind = type(module)
        if library is official:
            mixin: Any = official.LIFNode
        elif kind in library.SERVED:
            mixin = library.SERVED[kind]
        else:
            served = ", ".join(known.__name__ for known in library.SERVED)
            return None, f"{kind.__module__}.{kind.__qualname__} itself is not served: {served} are"
        reason = mixin.why_not(module)
        return (mixin, "") if reason is None else (None, reason)
    for library, reason in unknown:
        # By its name: the classes of an unknown version are unknown too.
        own = type(module).__module__.split(".")[0] == library.__name__
        if own and type(module).__name__.endswith(("Node", "Leaky")):
            return None, reason
    return None, ""


def accelerate(
    model: nn.Module,
    *,
    inplace: bool = True,
    strict: bool = False,
    fuse_batch_norm: bool = False,
) -> AccelerationReport:
    """Serves every neuron that it can, inside of any model, by the kernels of this package.

    Known are SpikingJelly 2.0's IFNode, LIFNode and ParametricLIFNode, snnTorch 1.0's Leaky, and
    the official TRT code's LIFNode. Float32 spikes stay what they were bit for bit; half input is
    integrated in float32. A module stays the same object with the same parameters, buffers, names
    and state, and becomes an instance of a subclass of its class: isinstance, state_dict,
    `functional.reset_net`, `detach_net` and snnTorch's resets work as before. Its attributes are
    read at every call. A subclass of these neurons may do anything, so it is left alone.

    Args:
        model: any module; a neuron itself too.
        inplace: False for a deep copy, the report's `model`.
        strict: raise where a neuron is left, before anything is changed.
        fuse_batch_norm: also let a neuron do the BatchNorm before it, in `batch_norm_lif`: where a
            torch.fx graph of the model shows that only this neuron reads its output, once, in
            training and in evaluation. Both stay where they are. Spikes are those of the same mean
            and deviation, computed another way: about one in 10⁴ differs. What is called with
            BatchNorm and neuron apart, or hooked between them, later on is no longer the model that
            was looked at: the first mostly raises, hooks see what is not normalised.

    Returns:
        What was replaced by what, and what was left and why.

    Raises:
        TypeError: a wrong argument, named.
        ValueError: with `strict`, the neurons that are left, and the setting that prevents each.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, needs a torch.nn.Module")
    checks.boolean("inplace", inplace)
    checks.boolean("strict", strict)
    checks.boolean("fuse_batch_norm", fuse_batch_norm)
    if not inplace:
        model = copy.deepcopy(model)
    report = AccelerationReport(model)
    libraries, unknown = _libraries()
    plan: dict[nn.Module, Any] = {}
    for name, module in model.named_modules():
        if isinstance(module, Served):
            mixin: Any = type(module).mixin
            reason = ""
            if isinstance(module, Deferred):
                continue
        else:
            mixin, reason = _why_left(module, libraries, unknown)
        if mixin is not None:
            plan[module] = mixin
            report.replaced[name] = f"{type(module).__name__} as lif"
        elif reason:
            report.left[name] = reason
    if strict and report.left:
        raise ValueError(
            "strict: some neurons cannot be served: "
            + "; ".join(f"{name}: {reason}" for name, reason in report.left.items())
        )
    for module, mixin in plan.items():
        if not isinstance(module, Served):
            served: Any = module
            served.__class__ = served_class(mixin, type(module))
            served._begin()
    if fuse_batch_norm:
        _join(report, libraries, plan)
    return report


def _join(report: AccelerationReport, libraries: Any, plan: dict[nn.Module, Any]) -> None:
    neurons = {
        module: module._has_time()  # type: ignore[operator]
        for module in plan
        if module._joined is None
    }
    pairs, reasons = find_pairs(
        report.model,
        neurons,
        tuple(norm for library in libraries for norm in library.BATCH_NORMS),
        tuple(container for library in libraries for container in library.CONTAINERS),
    )
    names = {module: name for name, module in report.model.named_modules()}
    for norm, neuron, in_steps in pairs:
        norm.__class__ = served_class(Deferred, type(norm))
        norm.in_steps = in_steps  # type: ignore[assignment]
        neuron._joined = (norm,)  # type: ignore[assignment]
        report.joined[names[norm]] = names[neuron]
    report.not_joined = {names[module]: reason for module, reason in reasons.items()}


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: every module is the library's own again, with its state and parameters.

    Returns: the model. A model that was not accelerated is left as it is.
    Raises: TypeError: not an `nn.Module`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, needs a torch.nn.Module")
    served = [module for module in model.modules() if isinstance(module, Served)]
    # The BatchNorm of a neuron that is restored by itself must work again, too.
    served += [norm for module in served for norm in module._joined or ()]
    for module in dict.fromkeys(served):
        kind: Any = type(module)
        for name in ("_joined", "_waits", "in_steps", *kind.caches):
            vars(module).pop(name, None)
        module.__class__ = kind.original
    return model
