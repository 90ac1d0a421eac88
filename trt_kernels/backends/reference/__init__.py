"""Plain, readable PyTorch with autograd's own backward: the referee of every kernel."""

from .lif import lif
from .loss import temporal_loss
from .penalty import trt_penalty

__all__ = ["lif", "temporal_loss", "trt_penalty"]
