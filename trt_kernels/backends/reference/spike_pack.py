"""Spikes as bits, and back, in plain PyTorch."""

import torch
from torch import Tensor


def _places(like: Tensor) -> Tensor:
    return torch.arange(8, dtype=torch.uint8, device=like.device)


def spike_pack(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of a dense x in the order of memory: its bits [1, ceil(n / 8)], and whether it is binary."""
    n = x.numel()
    flat = x.detach().as_strided((n,), (1,))
    ones = flat == 1
    binary = (ones | (flat == 0) & ~flat.signbit()).all()
    padded = torch.nn.functional.pad(ones.to(torch.uint8), (0, -n % 8)).reshape(-(-n // 8), 8)
    return (padded << _places(x)).sum(1, dtype=torch.uint8).unsqueeze(0), binary


def spike_unpack(bits: Tensor, outer: int, steps: int, inner: int, dtype: torch.dtype) -> Tensor:
    """The elements in the order of memory, [outer · steps · inner]."""
    spikes = (bits.unsqueeze(-1) >> _places(bits) & 1).flatten(1)[:, : outer * inner]
    return spikes.reshape(steps, outer, inner).transpose(0, 1).to(dtype).flatten()
