"""Which BatchNorms can be joined with the neuron after them: read from the graph of the model."""

import copy
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
Types = tuple[type[nn.Module], ...]


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


def is_container(module: nn.Module, known: Types) -> bool:
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


@contextmanager
def _left_as_it_is(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in a mode, without hooks; afterwards with every attribute that it had before."""
    before = {}
    for module in model.modules():
        attributes = vars(module)
        contents = {k: list(v) for k, v in attributes.items() if type(v) is list}
        before[module] = dict(attributes), contents
        attributes.update({"training": training, **{name: {} for name in _HOOKS}})
    try:
        yield
    finally:
        for module, (attributes, contents) in before.items():
            vars(module).clear()
            vars(module).update(attributes)
            for name, content in contents.items():
                attributes[name][:] = content


def _stored(model: nn.Module) -> set[fx.Node]:
    """What the traced forward has left in attributes of its modules."""
    values: list[Any] = []
    for module in model.modules():
        for value in vars(module).values():
            values += value if isinstance(value, (list, tuple)) else [value]
    return {value.node for value in values if isinstance(value, fx.Proxy)}


def find_pairs(
    model: nn.Module, neurons: dict[nn.Module, bool], norms: Types, containers: Types
) -> tuple[list[Pair], dict[nn.Module, str]]:
    """The pairs that are safe to join, in training and in evaluation; and BatchNorms before a
    neuron that are not, with the reason. `model` is among these where it has no graph.

    Args:
        neurons: those that are served, and whether each has time.
        norms: BatchNorms that know time, by their step_mode.
    """
    contain = {m for m in model.modules() if is_container(m, containers)}
    norms_there = {m for m in model.modules() if isinstance(m, (*norms, *_PLAIN))}
    tracer = _Tracer(contain | norms_there | set(neurons))
    names = dict(model.named_modules(remove_duplicate=False))
    shared = Counter(map(id, names.values()))
    found: list[list[Pair]] = []
    reasons: dict[nn.Module, str] = {}
    for training in (True, False):
        pairs: list[Pair] = []
        with _left_as_it_is(model, training):
            try:
                graph = tracer.trace(model)
            except Exception as error:  # whatever the model's code raises on a stand-in of a tensor
                first = (str(error).strip().splitlines() or [""])[0]
                return [], {model: f"no graph of it: {type(error).__name__}: {first}"}
            stored = _stored(model)
        calls = Counter(id(names[n.target]) for n in graph.nodes if n.op == "call_module")
        for node in graph.nodes:
            if node.op != "call_module" or names[node.target] not in neurons:
                continue
            neuron = names[node.target]
            before = node.args[0] if len(node.args) == 1 and not node.kwargs else None
            if not isinstance(before, fx.Node) or before.op != "call_module":
                continue
            source = names[before.target]
            contained = source in contain
            norm = _last_layer(source) if contained else source
            if not isinstance(norm, nn.modules.batchnorm._BatchNorm):
                continue
            reason = _why_not(norm, neuron, neurons[neuron], contained, norms)
            if len(before.users) > 1 or before in stored:
                reason = "something else reads its output too"
            elif not contained and len(before.all_input_nodes[0].users) > 1:
                reason = "something else reads its input too, and may change it"
            elif max(calls[id(source)], calls[id(neuron)]) > 1:
                reason = "it, or the neuron after it, is called more than once"
            elif max(shared[id(norm)], shared[id(neuron)]) > 1:
                reason = "it, or the neuron after it, is shared by several modules"
            elif _hooks_between(names, before.target, norm, node.target):
                reason = "a hook may see its output"
            if reason is None:
                pairs.append(Pair(norm, neuron, contained))
            else:
                reasons[norm] = reason
        found.append(pairs)
    both = [pair for pair in found[0] if pair in found[1]]
    for pair in found[0] + found[1]:
        if pair not in both and pair.norm not in reasons:
            reasons[pair.norm] = "training and evaluation differ in what follows it"
    return [pair for pair in both if pair.norm not in reasons], reasons


def _hooks_between(names: dict[Any, Any], source: Any, norm: Any, neuron: Any) -> bool:
    """Whether the BatchNorm, the neuron, or a module round one of them alone has a hook."""

    def around(name: str) -> set[str]:
        parts = name.split(".")
        return {".".join(parts[:count]) for count in range(1, len(parts) + 1)}

    alone = [names[name] for name in around(source) ^ around(neuron)]
    inside = list(names[source].modules())
    return any(getattr(m, hooks) for m in (*alone, *inside, norm) for hooks in _HOOKS)


def _why_not(norm: Any, neuron: Any, has_time: bool, contained: bool, norms: Types) -> str | None:
    if type(norm) not in (*norms, *_PLAIN):
        return f"it is a {type(norm).__name__}, not a BatchNorm1d, 2d or 3d itself"
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
