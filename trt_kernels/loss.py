"""Loss modules: the objectives of TRT and TET."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from . import checks
from .functional import mixed_loss, temporal_loss, trt_penalty

_LOSS_OPTIONS = ("class_weight", "ignore_index", "label_smoothing", "check", "backend")


def _checked(loss: str, options: dict[str, Any]) -> dict[str, Any]:
    unknown = options.keys() - set(_LOSS_OPTIONS)
    if unknown:
        raise TypeError(f"{loss}: unknown options {sorted(unknown)}; it takes {_LOSS_OPTIONS}")
    return options


def _named(parameters: Any) -> nn.Module | list[tuple[str, Tensor]]:
    if isinstance(parameters, nn.Module):
        return parameters
    named = [] if isinstance(parameters, Tensor) else parameters
    pairs = list(named) if isinstance(named, Iterable) else []
    for pair in pairs or [parameters]:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
            raise TypeError(
                f"parameters: got {type(pair).__name__}, needs an nn.Module or (name, tensor) "
                "pairs such as module.named_parameters()"
            )
    return pairs


class TRTLoss(nn.Module):
    """The TRT objective: temporal loss plus the time-decaying weight regularizer.

        L = (1/T) Σ_t [ (1-η)·CE(O_t, y) + η·mean (O_t - onehot(y))² ] + R(weights, T)

    Regularized is every named parameter without "bias" in its name. A module's parameters are
    looked up at every call, so replacing one is seen. The loss holds no parameters of its own;
    deep-copy it together with its model, or it regularizes a copy.

    Args:
        parameters: an `nn.Module`, or (name, tensor) pairs as `named_parameters()` gives.
        weight: λ of the regularizer. 0 leaves it out, at no cost, as a loop wants it that calls
            `trt_penalty_(loss.regularized(), steps=T, weight=..., delta=...)` after the backward.
        delta: δ >= 0 of the regularizer.
        mse_ratio: η in [0, 1].
        eps: ε >= 0.
        time_dim: time dimension of the logits, 0 or 1.
        loss_options: further arguments of `temporal_loss`, such as class_weight, ignore_index,
            label_smoothing, check, backend (which the regularizer shares).

    Forward: (logits [T, B, K] or [B, T, K], target [B] or [B, K]) -> scalar; differentiable in the
    logits and the parameters. Raises as `temporal_loss` and `trt_penalty`.

    Source: arXiv 2506.19256 and its official code.
    """

    def __init__(
        self,
        parameters: nn.Module | Iterable[tuple[str, Tensor]],
        *,
        weight: float,
        delta: float,
        mse_ratio: float,
        eps: float = 1e-5,
        time_dim: int = 0,
        **loss_options: Any,
    ) -> None:
        super().__init__()
        self.weight = checks.finite("weight", weight)
        self.delta = checks.non_negative("delta", delta)
        self.mse_ratio = checks.fraction("mse_ratio", mse_ratio)
        self.eps = checks.non_negative("eps", eps)
        self.time_dim = checks.dimension("time_dim", time_dim, 3)
        self.loss_options = _checked(type(self).__name__, loss_options)
        # In a tuple, so that the model does not become a part of its loss.
        self._source = (_named(parameters),)
        if not self.regularized():
            raise ValueError("parameters: got none without 'bias' in its name, needs at least one")

    def regularized(self) -> list[Tensor]:
        """The parameters that the regularizer sums over."""
        source = self._source[0]
        named = source.named_parameters() if isinstance(source, nn.Module) else source
        return [p for name, p in named if "bias" not in name]

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        if isinstance(logits, Tensor) and logits.ndim == 3 and not logits.shape[self.time_dim]:
            raise ValueError("logits: got no timestep, needs at least one for the regularizer")
        loss = temporal_loss(
            logits, target, mse_ratio=self.mse_ratio, time_dim=self.time_dim, **self.loss_options
        )
        if self.weight == 0:
            return loss
        return loss + trt_penalty(
            self.regularized(),
            steps=logits.shape[self.time_dim],
            weight=self.weight,
            delta=self.delta,
            eps=self.eps,
            backend=self.loss_options.get("backend"),
        )

    def extra_repr(self) -> str:
        return (
            f"weight={self.weight}, delta={self.delta}, mse_ratio={self.mse_ratio}, "
            f"eps={self.eps}, time_dim={self.time_dim}"
        )


class TETLoss(nn.Module):
    """The TET objective: L = (1-l)·(1/T) Σ_t CE(O_t, y) + l·mean (O - φ)².

    Args:
        mean: φ, what the logits are pulled to (the paper uses the firing threshold).
        weight: l in [0, 1].
        time_dim: time dimension of the logits, 0 or 1.
        loss_options: further arguments of `temporal_loss`, such as class_weight or backend.

    Forward: (logits [T, B, K] or [B, T, K], target [B] or [B, K]) -> scalar; differentiable in the
    logits. Raises as `temporal_loss`.

    Source: Deng et al., "Temporal Efficient Training" (ICLR 2022).
    """

    def __init__(
        self, *, mean: float, weight: float, time_dim: int = 0, **loss_options: Any
    ) -> None:
        super().__init__()
        self.mean = checks.finite("mean", mean)
        self.weight = checks.fraction("weight", weight)
        self.time_dim = checks.dimension("time_dim", time_dim, 3)
        self.loss_options = _checked(type(self).__name__, loss_options)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return mixed_loss(
            logits,
            target,
            entropy_ratio=1 - self.weight,
            square_ratio=self.weight,
            constant=self.mean,
            time_dim=self.time_dim,
            **self.loss_options,
        )

    def extra_repr(self) -> str:
        return f"mean={self.mean}, weight={self.weight}, time_dim={self.time_dim}"
