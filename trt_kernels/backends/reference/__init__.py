"""Plain, readable PyTorch with autograd's own backward: the referee of every kernel."""

from .lif import batch_statistics, lif
from .loss import temporal_loss
from .penalty import trt_penalty
from .spike_pack import spike_pack, spike_unpack

__all__ = [
    "batch_statistics",
    "lif",
    "spike_pack",
    "spike_unpack",
    "temporal_loss",
    "trt_penalty",
]
