"""The compiled module, csrc/bindings.cpp; tests/test_setup.py compares the two.

An `Address` is where elements lie in memory, 0 for none. A module built without CUDA lacks what
begins with `cuda`, but for `cuda_devices`.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

Address: TypeAlias = int
# dtype, elements, addresses of weight and gradient, add to the gradient?
_PenaltyRow: TypeAlias = tuple[DType, int, Address, Address, bool]

class DType:
    float32: ClassVar[DType]
    float64: ClassVar[DType]
    float16: ClassVar[DType]
    bfloat16: ClassVar[DType]

class _Arguments:
    neuron: Address
    stats: Address
    norm_weight: Address
    norm_bias: Address
    gains: Address
    x: Address
    v_init: Address
    penalty_weight: Address
    bits: Address
    checkpoints: Address
    def __init__(
        self,
        dtype: DType,
        outer: int,
        steps: int,
        inner: int,
        channels: int,
        channel_stride: int,
        *,
        constant: bool,
        gains_by_channel: bool,
        checkpoint_every: int,
    ) -> None: ...

class LIFForward(_Arguments):
    spikes: Address
    potential: Address
    state: Address
    penalty: Address
    rate: Address

class LIFBackward(_Arguments):
    means: Address
    grad_spikes: Address
    grad_potential: Address
    grad_state: Address
    grad_penalty: Address
    grad_x: Address
    grad_v_init: Address
    grad_neuron: Address
    grad_affine: Address
    grad_gains: Address

class LIF:
    def __init__(
        self,
        *,
        charge: str,
        reset: str,
        surrogate: str,
        phi: str,
        decay: float,
        tau: float,
        threshold: float,
        v_reset: float,
        detach_reset: bool,
        fire_at_threshold: bool,
        surrogate_parameter: float,
        delta: float,
        eps: float,
        scale: float,
        batch: bool,
        bits: int,
    ) -> None: ...
    def cpu_forward(self, arguments: LIFForward, threads: int, /) -> None: ...
    def cpu_backward(self, arguments: LIFBackward, threads: int, /) -> None: ...
    def cpu_forward_plain(
        self,
        dtype: DType,
        sizes: Sequence[int],
        time_dim: int,
        x: Address,
        spikes: Address,
        threads: int,
        /,
    ) -> None: ...
    def cpu_backward_plain(
        self,
        dtype: DType,
        sizes: Sequence[int],
        time_dim: int,
        x: Address,
        grad_spikes: Address,
        grad_x: Address,
        threads: int,
        /,
    ) -> None: ...
    def cpu_forward_carried(
        self,
        dtype: DType,
        sizes: Sequence[int],
        time_dim: int,
        x: Address,
        spikes: Address,
        v_init: Address,
        state: Address,
        potential: Address,
        threads: int,
        /,
    ) -> None: ...
    def cpu_backward_carried(
        self,
        dtype: DType,
        sizes: Sequence[int],
        time_dim: int,
        x: Address,
        grad_spikes: Address,
        grad_x: Address,
        v_init: Address,
        grad_v_init: Address,
        grad_state: Address,
        grad_potential: Address,
        threads: int,
        /,
    ) -> None: ...
    def cuda_forward_workspace(self, arguments: LIFForward, /) -> int: ...
    def cuda_backward_workspace(self, arguments: LIFBackward, /) -> int: ...
    def cuda_forward(
        self, arguments: LIFForward, workspace: Address, device: int, stream: Address, /
    ) -> None: ...
    def cuda_backward(
        self, arguments: LIFBackward, workspace: Address, device: int, stream: Address, /
    ) -> None: ...
    def cuda_forward_plain(
        self,
        dtype: DType,
        sizes: Sequence[int],
        time_dim: int,
        x: Address,
        spikes: Address,
        checkpoints: Address,
        checkpoint_every: int,
        device: int,
        stream: Address,
        /,
    ) -> None: ...
    def cuda_backward_plain(
        self,
        dtype: DType,
        sizes: Sequence[int],
        time_dim: int,
        x: Address,
        grad_spikes: Address,
        grad_x: Address,
        checkpoints: Address,
        checkpoint_every: int,
        device: int,
        stream: Address,
        /,
    ) -> None: ...
    def cuda_forward_carried(
        self,
        dtype: DType,
        sizes: Sequence[int],
        time_dim: int,
        x: Address,
        spikes: Address,
        v_init: Address,
        state: Address,
        potential: Address,
        checkpoints: Address,
        checkpoint_every: int,
        device: int,
        stream: Address,
        /,
    ) -> None: ...
    def cuda_backward_carried(
        self,
        dtype: DType,
        sizes: Sequence[int],
        time_dim: int,
        x: Address,
        grad_spikes: Address,
        grad_x: Address,
        v_init: Address,
        grad_v_init: Address,
        grad_state: Address,
        grad_potential: Address,
        checkpoints: Address,
        checkpoint_every: int,
        device: int,
        stream: Address,
        /,
    ) -> None: ...

class Statistics:
    def __init__(
        self,
        dtype: DType,
        before: int,
        channels: int,
        within: int,
        eps: float,
        repeat: int,
        x: Address,
        stats: Address,
        /,
    ) -> None: ...
    def cpu(self, threads: int, /) -> None: ...
    def cuda_workspace(self) -> int: ...
    def cuda(self, workspace: Address, device: int, stream: Address, /) -> None: ...

class Penalty:
    def __init__(self, *, growth: Sequence[float], scale: float, eps: float) -> None: ...
    def cpu_value(
        self, rows: Sequence[_PenaltyRow], dtype: DType, out: Address, threads: int, /
    ) -> None: ...
    def cpu_gradient(
        self,
        rows: Sequence[_PenaltyRow],
        scale: float,
        dtype: DType,
        upstream: Address,
        threads: int,
        /,
    ) -> None: ...
    def cuda_value_workspace(self, elements: int, tensors: int, /) -> int: ...
    def cuda_gradient_workspace(self) -> int: ...
    def cuda_value(
        self,
        rows: Sequence[_PenaltyRow],
        dtype: DType,
        out: Address,
        workspace: Address,
        device: int,
        stream: Address,
        /,
    ) -> None: ...
    def cuda_gradient(
        self,
        rows: Sequence[_PenaltyRow],
        scale: float,
        dtype: DType,
        upstream: Address,
        workspace: Address,
        device: int,
        stream: Address,
        /,
    ) -> None: ...

class Loss:
    def __init__(
        self,
        *,
        dtype: DType,
        steps: int,
        batch: int,
        classes: int,
        step_stride: int,
        batch_stride: int,
        entropy_ratio: float,
        square_ratio: float,
        constant: float | None,
        label_smoothing: float,
        ignore_index: int,
    ) -> None: ...
    def cpu_value(
        self,
        logits: Address,
        target: Address,
        probabilities: Address,
        class_weight: Address,
        log_normalizer: Address,
        out: Address,
        threads: int,
        /,
    ) -> None: ...
    def cpu_gradient(
        self,
        logits: Address,
        target: Address,
        probabilities: Address,
        class_weight: Address,
        log_normalizer: Address,
        upstream: Address,
        grad: Address,
        threads: int,
        /,
    ) -> None: ...
    def cuda_workspace(self) -> int: ...
    def cuda_value(
        self,
        logits: Address,
        target: Address,
        probabilities: Address,
        class_weight: Address,
        log_normalizer: Address,
        divisors: Address,
        out: Address,
        workspace: Address,
        device: int,
        stream: Address,
        /,
    ) -> None: ...
    def cuda_gradient(
        self,
        logits: Address,
        target: Address,
        probabilities: Address,
        class_weight: Address,
        log_normalizer: Address,
        divisors: Address,
        upstream: Address,
        grad: Address,
        device: int,
        stream: Address,
        /,
    ) -> None: ...

def cpu_spike_pack(
    dtype: DType, count: int, x: Address, bits: Address, threads: int, /
) -> bool: ...
def cpu_spike_unpack(
    dtype: DType, bits: Address, outer: int, steps: int, inner: int, to: Address, threads: int, /
) -> None: ...
def cuda_spike_pack(
    dtype: DType,
    count: int,
    x: Address,
    bits: Address,
    binary: Address,
    device: int,
    stream: Address,
    /,
) -> None: ...
def cuda_spike_unpack(
    dtype: DType,
    bits: Address,
    outer: int,
    steps: int,
    inner: int,
    to: Address,
    device: int,
    stream: Address,
    /,
) -> None: ...
def build_info() -> dict[str, Any]: ...
def cpu_levels() -> list[str]: ...
def cpu_level() -> str: ...
def set_cpu_level(level: str, /) -> None: ...
def cuda_why_not(device: int, /) -> str: ...
def cuda_devices() -> tuple[int, str]: ...
