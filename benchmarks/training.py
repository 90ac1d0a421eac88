"""A training step as a benchmark runs it, and what holds it to the official one."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import record_function

import trt_kernels as tk
from benchmarks.parts import Neurons, costs
from benchmarks.records import OPTIMIZER
from benchmarks.steps import Mismatch, Results, Step, Tensors

# Of a layer's spikes, given the same input: rounding moves a potential over the threshold. A few
# are allowed in a layer however small.
DIFFERENT_SPIKES = {None: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
FEW = 3


class TrainingStep(Step):
    """Forward pass, loss, backward pass and optimizer.

    Adam's learning rate is 0: it computes all that it computes in training, and every step sees the
    same weights.

    Args:
        objective: logits -> loss.
        shown: the batch x as the network takes it.
        half: the dtype of autocast; None for none. float16 comes with a GradScaler.
        time_dim: of the network's layers.
        guide: the step whose spikes `results` is given, layer by layer.
    """

    def __init__(
        self,
        net: nn.Module,
        x: Tensor,
        objective: Callable[[Tensor], Tensor],
        *,
        shown: Callable[[Tensor], Tensor] = lambda x: x,
        half: torch.dtype | None = None,
        packed: bool = False,
        time_dim: int = 0,
        guide: "TrainingStep | None" = None,
    ) -> None:
        super().__init__(self.loss, list(net.parameters()), [torch.ones((), device=x.device)])
        self.net, self.x, self.objective, self.shown = net, x, objective, shown
        self.half, self.packed, self.time_dim, self.guide = half, packed, time_dim, guide
        self.optimizer = torch.optim.Adam(self.inputs, lr=0.0)
        # A scale that overflows nothing here: no step is skipped.
        self.scaler = torch.amp.GradScaler(
            x.device.type, init_scale=2.0**10, enabled=half == torch.float16
        )
        self.spikes: list[Tensor] | None = None

    def loss(self, *_: Tensor) -> Tensor:
        packing: AbstractContextManager[Any] = nullcontext()
        if self.packed:
            packing = tk.pack_saved_spikes()
        device, enabled = self.x.device.type, self.half is not None
        with packing, torch.autocast(device, self.half, enabled=enabled):
            return self.objective(self.net(self.shown(self.x)))

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(self.loss()).backward()
        with record_function(OPTIMIZER):
            self.scaler.step(self.optimizer)
            self.scaler.update()

    def results(self) -> Results:
        """The loss and the gradient of every parameter, on the guide's spikes if there is one.

        A spike that rounding moves moves others in every layer above, ten times as many in each: of
        two networks without a guide only the first layers are the same.
        """
        with self.recorded() if self.guide is None else self.guided(self.guide):
            loss = self.loss()
        grads = torch.autograd.grad(self.scaler.scale(loss), self.inputs)
        return [loss.detach()], [grad / self.scaler.get_scale() for grad in grads]

    def recorded(self) -> AbstractContextManager[None]:
        """Notes the spikes of every layer."""
        self.spikes = spikes = []

        def record(module: nn.Module, inputs: Any, out: Tensor) -> None:
            spikes.append(out.detach().movedim(self.time_dim, 0).bool())

        return hooked(self.net, record)

    def guided(self, guide: "TrainingStep") -> AbstractContextManager[None]:
        """Lets every layer see the guide's spikes; its own must be these but for a few."""
        if guide.spikes is None:
            guide.results()
        spikes = iter(guide.spikes or ())
        share = DIFFERENT_SPIKES[self.half]

        def replace(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
            wanted = next(spikes).movedim(0, self.time_dim).to(out.dtype).contiguous()
            different = int((out.detach() != wanted).sum())
            if different > max(FEW, share * out.numel()):
                raise Mismatch(
                    f"{type(module).__name__}: {different} of {out.numel()} spikes differ from the "
                    f"official ones on the same input, allowed {share:g} of them"
                )
            # Its own gradient, of the guide's value.
            return wanted + (out - out.detach())

        return hooked(self.net, replace)

    def facts(self, median: float) -> dict[str, Any]:
        return {**super().facts(median), **costs(self, self.net, self.x.device, median)}

    # It has weights of its own, and a step's tensors are far larger than a cache.
    def cloned_tensors(self) -> Tensors:
        return list(self.inputs), list(self.grads or ())

    def over(self, inputs: Any, grads: Any) -> "TrainingStep":
        return self


class Unguided(TrainingStep):
    """Held only to the loss and the size of the gradient, where no hook can be inside."""

    def results(self) -> Results:
        loss = self.loss()
        grads = torch.autograd.grad(self.scaler.scale(loss), self.inputs)
        size = torch.cat([grad.flatten() for grad in grads]).norm() / self.scaler.get_scale()
        return [loss.detach()], [size]

    def facts(self, median: float) -> dict[str, Any]:
        """Without operations: under a mode that counts them torch.compile runs what is as it is."""
        return {k: fact for k, fact in super().facts(median).items() if k != "operations"}


@contextmanager
def hooked(net: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    """A forward hook on every layer of neurons."""
    kinds = (tk.nn.LIF, tk.nn.BatchNormLIF, Neurons)
    handles = [m.register_forward_hook(hook) for m in net.modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
