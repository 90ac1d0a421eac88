"""The names of the official TRT code: change its imports of `neuron` and `function` to this.

    from trt_kernels.compat.trt import LIFNode, TET_Loss, TRT_Loss

Source: ZBX05/Temporal-Regularization-Training, for arXiv 2506.19256.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import checks
from ..functional import lif, mixed_loss, temporal_loss, trt_penalty
from ..presets import official_trt

__all__ = ["LIFNode", "TET_Loss", "TRT_Loss"]


class LIFNode(nn.Module):
    """The official neuron on x [B, T, *]: h = v / tau + x; see `presets.official_trt`.

    Spikes have x's shape and dtype and are those of the official code bit for bit in float32; half
    input is integrated in float32. Every call starts from a potential of 0, as there, and nothing
    is kept between calls: `reset()` is there for code that calls it.
    """

    def __init__(
        self,
        v_threshold: float = 0.5,
        v_reset: float | None = 0.0,
        tau: float = 5,
        surrogate_type: str = "sigmoid",
        surrogate_param: float = 2.0,
        surrogate_m: int = 5,
    ) -> None:
        super().__init__()
        self.v_threshold, self.v_reset, self.tau = v_threshold, v_reset, tau
        self.surrogate_type, self.surrogate_param = surrogate_type, surrogate_param
        self.surrogate_m = surrogate_m  # of the random surrogate, which is refused
        self.lif_options()

    def lif_options(self) -> dict[str, Any]:
        """The attributes as options of `lif`: the official code reads them at every call."""
        return official_trt(
            v_threshold=self.v_threshold,
            v_reset=self.v_reset,
            tau=self.tau,
            surrogate_type=self.surrogate_type,
            surrogate_param=self.surrogate_param,
        )

    def forward(self, X: Tensor) -> Tensor:
        checks.tensor("X", X)
        if X.ndim < 2:
            raise ValueError(f"X: got shape {tuple(X.shape)}, needs [B, T, *]")
        spikes: Tensor = lif(X, **self.lif_options())
        return spikes

    def reset(self) -> None:
        """Nothing to forget."""

    def extra_repr(self) -> str:
        return (
            f"v_threshold={self.v_threshold}, v_reset={self.v_reset}, tau={self.tau}, "
            f"surrogate_type={self.surrogate_type!r}, surrogate_param={self.surrogate_param}"
        )


def _cross_entropy(criterion: Any) -> dict[str, Any] | None:
    """The options of a criterion that is the mean cross entropy; None for any other."""
    if criterion is F.cross_entropy:
        return {}
    if type(criterion) is not nn.CrossEntropyLoss or criterion.reduction != "mean":
        return None
    return {
        "class_weight": criterion.weight,
        "ignore_index": criterion.ignore_index,
        "label_smoothing": criterion.label_smoothing,
    }


def _check_outputs(outputs: Tensor) -> int:
    checks.tensor("outputs", outputs)
    if outputs.ndim != 3:
        raise ValueError(f"outputs: got shape {tuple(outputs.shape)}, needs [B, T, K]")
    if outputs.shape[1] == 0:
        raise ValueError(f"outputs: got shape {tuple(outputs.shape)}, needs at least one timestep")
    return outputs.shape[1]


def TRT_Loss(
    model: nn.Module,
    outputs: Tensor,
    labels: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    decay: float,
    lamb: float,
    epsilon: float,
    eta: float = 0.05,
) -> Tensor:
    """The official objective, L = (1/T) Σ_t [(1-eta)·criterion(O_t, y) + eta·MSE + R_t].

    One launch for the loss and one for the regularizer where `criterion` is a mean cross entropy
    (`nn.CrossEntropyLoss`, `F.cross_entropy`); with label smoothing or an ignore_index of its own
    one more, as the squared term knows neither. A loop over time for any other callable.

    Args:
        model: regularized is every named parameter without "bias" in its name.
        outputs: logits [B, T, K]; labels: int64 [B].
        criterion: (logits [B, K] in float32, labels) -> scalar.
        decay: δ; lamb: λ; epsilon: ε; eta: η of the squared distance to the one-hot label.

    Returns: a scalar, differentiable in outputs and parameters. Nothing synchronises with a GPU.
    Raises: as `temporal_loss` and `trt_penalty`.
    """
    steps = _check_outputs(outputs)
    eta = checks.fraction("eta", eta)
    params = [p for name, p in model.named_parameters() if "bias" not in name]
    penalty: Any = 0
    if params:
        penalty = trt_penalty(params, steps=steps, weight=lamb, delta=decay, eps=epsilon)
    options = _cross_entropy(criterion)
    loss: Any = 0
    if options is None:
        for logits in outputs.unbind(1):
            loss = loss + criterion(logits.float(), labels)
        loss = (1 - eta) / steps * loss
    elif eta == 0 or (not options.get("label_smoothing") and options.get("ignore_index", -1) < 0):
        loss = temporal_loss(outputs, labels, mse_ratio=eta, time_dim=1, **options)
        eta = 0.0  # in there
    else:
        loss = (1 - eta) * temporal_loss(outputs, labels, time_dim=1, **options)
    if eta:
        loss = loss + eta * temporal_loss(outputs, labels, mse_ratio=1.0, time_dim=1)
    result: Tensor = loss + penalty
    return result


def TET_Loss(
    outputs: Tensor,
    labels: Tensor,
    criterion: Callable[[Tensor, Tensor], Tensor],
    means: float,
    lamb: float,
) -> Tensor:
    """The official TET loss, (1-lamb)·(1/T) Σ_t criterion(O_t, y) + lamb·mean (O - means)².

    One launch where `criterion` is a mean cross entropy, a loop over time for any other callable.
    Rows whose label is ignored by the cross entropy are left out of the squared term too.

    Args: as in `TRT_Loss`; means: what the logits are pulled to, lamb: how much, in [0, 1].
    Returns, raises: as `TRT_Loss`.
    """
    steps = _check_outputs(outputs)
    lamb, means = checks.fraction("lamb", lamb), checks.finite("means", means)
    options = _cross_entropy(criterion)
    if options is not None:
        return mixed_loss(
            outputs,
            labels,
            entropy_ratio=1 - lamb,
            square_ratio=lamb,
            constant=means,
            time_dim=1,
            **options,
        )
    loss: Any = 0
    for logits in outputs.unbind(1):
        loss = loss + criterion(logits, labels)
    loss = (1 - lamb) / steps * loss
    if lamb:
        loss = loss + lamb * ((outputs - means) ** 2).mean()
    result: Tensor = loss
    return result
