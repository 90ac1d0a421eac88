"""Which BatchNorms can be joined with the neuron after them: read from the graph of the model."""

import copy
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import fx, nn

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Pair(NamedTuple):
    """A BatchNorm that only the neuron reads."""

    norm: nn.Module
    neuron: nn.Module
    in_steps: bool  # the BatchNorm is inside of what flattens time and batch together


class _Tracer(fx.Tracer):
    def __init__(self, leaves: set[nn.Module]) -> None:
        super().__init__()
        self.leaves = leaves

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        if module in self.leaves:
            return True
        if isinstance(module, nn.Sequential):
            return False
        own = type(module).__module__.startswith("spikingjelly.activation_based.layer")
        return own or super().is_leaf_module(module, name)


def is_container(module: nn.Module, known: tuple[type[nn.Module], ...]) -> bool:
    """Whether it runs layers without time on x [T, B, *] or [B, T, *], as if all were a batch."""
    if type(module) in known:
        return True
    if type(module).__name__ != "SeqToANNContainer" or list(module._modules) != ["module"]:
        return False
    probe = copy.copy(module)
    probe.__dict__["_modules"] = {"module": nn.Identity()}
    x = torch.arange(24.0).view(2, 3, 4)
    return bool(torch.equal(probe(x), x))


def _last_layer(container: nn.Module) -> nn.Module | None:
    layers = container._modules.get("module", container)
    if isinstance(layers, nn.Sequential):
        children = list(layers.children())
        layers = children[-1] if children else None
    return layers


def _graphs(
    module: nn.Module, tracer: _Tracer, failures: list[str], name: str = ""
) -> Iterator[tuple[fx.Graph, nn.Module]]:
    """The graph of a module; where it has none, those of its children."""
    try:
        graph = tracer.trace(module)
    except Exception as error:  # whatever the model's own code raises on a stand-in for a tensor
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        failures.append(f"{name or 'the model'}: {type(error).__name__}: {reason}")
        for child_name, child in module.named_children():
            if not tracer.is_leaf_module(child, child_name):
                inner = f"{name}.{child_name}" if name else child_name
                yield from _graphs(child, tracer, failures, inner)
        return
    yield graph, module


def find_pairs(
    model: nn.Module,
    neurons: dict[nn.Module, bool],
    norms: tuple[type[nn.Module], ...],
    containers: tuple[type[nn.Module], ...],
) -> tuple[list[Pair], dict[nn.Module, str], list[str]]:
    """The pairs that are safe to join; the reasons of BatchNorms before a neuron that are not; and
    which modules have no graph.

    Args:
        neurons: those that are served, and whether each has time.
        norms: BatchNorms that know time, by their step_mode.
    """
    contain = {m for m in model.modules() if is_container(m, containers)}
    norms_there = {m for m in model.modules() if isinstance(m, (*norms, *_PLAIN))}
    tracer = _Tracer(contain | norms_there | set(neurons))
    names = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    pairs: list[Pair] = []
    reasons: dict[nn.Module, str] = {}
    failures: list[str] = []
    for graph, root in _graphs(model, tracer, failures):
        modules = dict(root.named_modules(remove_duplicate=False))
        calls = Counter(id(modules[n.target]) for n in graph.nodes if n.op == "call_module")
        for node in graph.nodes:
            if node.op != "call_module" or modules[node.target] not in neurons:
                continue
            neuron = modules[node.target]
            before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if not isinstance(before, fx.Node) or before.op != "call_module":
                continue
            source = modules[before.target]
            contained = source in contain
            norm = _last_layer(source) if contained else source
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            reason = _why_not(norm, neuron, neurons[neuron], contained, norms)
            if reason is None and len(before.users) > 1:
                reason = "something else reads its output too"
            if reason is None and max(calls[id(source)], calls[id(neuron)]) > 1:
                reason = "it, or the neuron after it, is called more than once"
            if reason is None and max(names[id(norm)], names[id(neuron)]) > 1:
                reason = "it, or the neuron after it, is shared by several modules"
            if reason is None:
                pairs.append(Pair(norm, neuron, contained))
            else:
                reasons[norm] = reason
    return pairs, reasons, failures


def _why_not(
    norm: Any, neuron: Any, has_time: bool, contained: bool, norms: tuple[type[nn.Module], ...]
) -> str | None:
    if type(norm) not in (*norms, *_PLAIN):
        return f"it is a {type(norm).__name__}, not a BatchNorm1d, 2d or 3d itself"
    if norm._forward_hooks or neuron._forward_pre_hooks:
        return "a hook sees its output"
    if "forward" in vars(norm):
        return "its forward was replaced"
    knows_time = contained or (type(norm) in norms and norm.step_mode == "m")
    if contained and type(norm) in norms and norm.step_mode == "m":
        return "it is in step mode 'm' inside of a container, which has flattened time"
    if knows_time and not has_time:
        return "it has time, and the neuron after it has not"
    if has_time and not knows_time:
        return "it has no time, and the neuron after it has"
    return None
