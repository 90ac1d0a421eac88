"""The operators on Triton, with the signatures and the meaning of those in ../native.py."""

from .lif import lif_backward, lif_forward
from .loss import temporal_loss_backward, temporal_loss_forward
from .penalty import trt_penalty_accumulate, trt_penalty_backward, trt_penalty_forward

__all__ = [
    "lif_backward",
    "lif_forward",
    "temporal_loss_backward",
    "temporal_loss_forward",
    "trt_penalty_accumulate",
    "trt_penalty_backward",
    "trt_penalty_forward",
]
