"""What is timed: a call with its tensors, and the result that it is held to."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Results = tuple[list[Tensor], list[Tensor]]
Tensors = tuple[list[Tensor], list[Tensor] | None]


class Mismatch(AssertionError):
    """A result that differs from the reference by more than its tolerance."""


class Step:
    """One forward pass of `function(*inputs)`, and one backward pass where `grads` are given.

    The results are allocated and freed within the step, as in training.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        inputs: Sequence[Tensor],
        grads: Sequence[Tensor] | None = None,
    ) -> None:
        self.function, self.inputs, self.grads = function, tuple(inputs), grads

    def __call__(self) -> Any:
        """Returns what whoever wants other memory for the next results must hold."""
        outputs = self.function(*self.inputs)
        if self.grads is None:
            return outputs
        return torch.autograd.grad(outputs, self.inputs, self.grads)

    def results(self) -> Results:
        """The outputs and the gradients of the inputs."""
        outputs = self.function(*self.inputs)
        listed = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        grads = [] if self.grads is None else torch.autograd.grad(listed, self.inputs, self.grads)
        return [o.detach() for o in listed], list(grads)

    def cloned_tensors(self) -> Tensors:
        """Copies of the inputs and the gradients."""
        inputs = [t.detach().clone().requires_grad_(t.requires_grad) for t in self.inputs]
        return inputs, None if self.grads is None else [g.clone() for g in self.grads]

    def over(self, inputs: Sequence[Tensor], grads: Sequence[Tensor] | None) -> "Step":
        """The same over other tensors."""
        return type(self)(self.function, inputs, grads)

    def facts(self, median: float) -> dict[str, Any]:
        """What is told of the step beside its time, `median` seconds."""
        return {} if self.grads is None else {"kept": self.kept()}

    def kept(self) -> int:
        """Bytes of the distinct storages that the forward pass keeps for the backward pass.

        What autograd saved for a result that nobody used, as a loop's last potential, is freed
        within the forward pass and is not counted.

        Where the function keeps something else in the place of a tensor, as `pack_saved_spikes`
        does, that is counted: the tensors of what its hook returns.
        """
        saved: list[weakref.ref[Tensor]] = []

        def counted(kept: Any) -> Any:
            parts = kept if isinstance(kept, tuple) else (kept,)
            saved.extend(weakref.ref(part) for part in parts if isinstance(part, Tensor))
            return kept

        class Counting(saved_tensors_hooks):
            """Only the innermost hooks are asked: those of the function are replaced by these."""

            def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]):
                super().__init__(lambda tensor: counted(pack(tensor)), unpack)

        with (
            mock.patch.object(torch.autograd.graph, "saved_tensors_hooks", Counting),
            # Detached: a result that its own node kept would never be freed.
            Counting(torch.Tensor.detach, lambda tensor: tensor),
        ):
            outputs = self.function(*self.inputs)
        alive = [tensor.untyped_storage() for ref in saved if (tensor := ref()) is not None]
        total = sum({storage.data_ptr(): storage.nbytes() for storage in alive}.values())
        del outputs
        return total


class Backward(Step):
    """The backward pass alone, again and again over one forward pass."""

    outputs: Any = None

    def __call__(self) -> Any:
        if self.outputs is None:
            self.outputs = self.function(*self.inputs)
        return torch.autograd.grad(self.outputs, self.inputs, self.grads, retain_graph=True)


@dataclass
class Expected:
    """The result that a step is held to: that of `step`, computed once, within relative errors.

    An output tolerance of 0 demands equality bit for bit. `part` cuts from every result what
    `step` computes, where all of it would be too much to compute.
    """

    step: Step
    output: float = 0.0
    gradient: float = 2e-6
    part: Callable[[Tensor], Tensor] | None = None
    _results: Results | None = field(default=None, repr=False)

    def check(self, name: str, results: Results) -> None:
        """Raises `Mismatch` with the size of the error if `results` are not these."""
        if self._results is None:
            self._results = self.step.results()
        for kind, got, wanted in zip(("output", "gradient"), results, self._results, strict=True):
            if len(got) != len(wanted):
                raise Mismatch(f"{name}: {len(got)} results of kind {kind}, expected {len(wanted)}")
            for index, (a, b) in enumerate(zip(got, wanted, strict=True)):
                part = a if self.part is None else self.part(a)
                compare(f"{name}: {kind} {index}", part, b, getattr(self, kind))


def compare(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raises `Mismatch` unless the relative error ‖got - expected‖ / ‖expected‖ is in tolerance."""
    if got.shape != expected.shape:
        raise Mismatch(f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    expected = expected.to(got.device)
    if tolerance == 0:
        wrong = int((got != expected).sum())
        if wrong:
            raise Mismatch(f"{name}: {wrong} of {got.numel()} elements differ from the reference")
        return
    got, expected = got.double(), expected.double()
    error = float((got - expected).norm()) / max(float(expected.norm()), torch.finfo().tiny)
    if not error <= tolerance:  # a NaN is a mismatch
        raise Mismatch(f"{name}: relative error {error:.2e} to the reference, allowed {tolerance}")
