"""Fused kernels for training spiking neural networks with temporal regularization.

Start with `lif`, `trt_penalty`, `temporal_loss` and the modules `nn.LIF`, `TRTLoss`, `TETLoss`;
`report()` says which backend runs and why.
"""

from . import nn, presets
from .acceleration import AccelerationReport, accelerate, restore
from .functional import LIFOutput, batch_norm_lif, lif, temporal_loss, trt_penalty, trt_penalty_
from .loss import TETLoss, TRTLoss
from .ops import use_backend
from .options import MembranePenalty
from .packing import pack_saved_spikes
from .report import Report, report
from .surrogates import ATan, FastSigmoid, Rectangle, Sigmoid, SignedStep, Surrogate, Triangle
from .version import __version__ as __version__

__all__ = [
    "ATan",
    "AccelerationReport",
    "FastSigmoid",
    "LIFOutput",
    "MembranePenalty",
    "Rectangle",
    "Report",
    "Sigmoid",
    "SignedStep",
    "Surrogate",
    "TETLoss",
    "TRTLoss",
    "Triangle",
    "accelerate",
    "batch_norm_lif",
    "lif",
    "nn",
    "pack_saved_spikes",
    "presets",
    "report",
    "restore",
    "temporal_loss",
    "trt_penalty",
    "trt_penalty_",
    "use_backend",
]
