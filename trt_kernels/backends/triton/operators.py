"""The operators on Triton, with the signatures and the meaning of those in ../native.py."""

from .batch_norm import batch_statistics
from .lif import lif_backward, lif_forward
from .loss import temporal_loss_backward, temporal_loss_forward
from .penalty import trt_penalty_accumulate, trt_penalty_backward, trt_penalty_forward
from .spike_pack import spike_pack, spike_unpack

__all__ = [
    "batch_statistics",
    "lif_backward",
    "lif_forward",
    "spike_pack",
    "spike_unpack",
    "temporal_loss_backward",
    "temporal_loss_forward",
    "trt_penalty_accumulate",
    "trt_penalty_backward",
    "trt_penalty_forward",
]
