"""Spikes that layers keep for their backward pass, kept as bits."""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from . import ops
from .backends import reference
from .backends.layout import fold, is_dense
from .checks import FLOATS, transforming

# Elements below which bits save less than what is kept beside them costs.
LEAST_ELEMENTS = 256


@dataclass
class PackingReport:
    """What `pack_saved_spikes` kept, in saved tensors; it counts on while the context is open."""

    from_lif: int = 0  # kept as the bits that `lif` wrote
    by_pass: int = 0  # kept as bits that a packing pass made
    left: int = 0  # kept as they are
    bytes_before: int = 0  # of what is kept as bits; what several layers keep counts once
    bytes_after: int = 0

    def __str__(self) -> str:
        kept = self.from_lif + self.by_pass
        text = (
            f"{kept} saved tensors kept as bits ({self.from_lif} from lif, {self.by_pass} packed)"
        )
        if self.bytes_after:
            before, after = self.bytes_before / 2**20, self.bytes_after / 2**20
            ratio = self.bytes_before / self.bytes_after
            text += f": {before:.2f} MiB as {after:.2f} MiB, {ratio:.1f} times smaller"
        return f"{text}; {self.left} left alone"


@dataclass(slots=True)
class _Found:
    """The bits of a piece of memory at one version of its tensor."""

    owner: TensorWeakRef  # the tensor, or the base of the view, that has this version counter
    version: int
    bits: Tensor
    sizes: tuple[int, int, int]  # outer, steps, inner of the bits
    from_lif: bool
    counted: bool = False  # in a report's bytes

    def holds_for(self, x: Tensor) -> bool:
        # The owner's version too: an alias by .data starts a count of its own.
        owner = self.owner()
        return owner is not None and owner._version == x._version == self.version


def _owner(x: Tensor) -> Tensor:
    return x if x._base is None else x._base


class _Packed(NamedTuple):
    bits: Tensor
    sizes: tuple[int, int, int]
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    backend: str

    def unpack(self) -> Tensor:
        kernels: Any = reference if self.backend == "reference" else ops.kernels(self.backend)
        arguments = (self.bits, *self.sizes, self.dtype, *_which(self.backend))
        flat: Tensor = kernels.spike_unpack(*arguments)
        return flat.as_strided(self.shape, self.stride)


class _Left(NamedTuple):
    tensor: Tensor
    version: int


def _which(backend: str) -> tuple[str, ...]:
    """native.py serves two backends, and is told which."""
    return (backend,) if backend in ("cpu", "cuda") else ()


def _is_tried(x: Tensor) -> bool:
    """True for a plain tensor of some size whose memory holds its values, and no parameter."""
    if x.__class__ is not Tensor or x.layout is not torch.strided or x.dtype not in FLOATS:
        return False
    if x.numel() < LEAST_ELEMENTS or x.is_neg() or x._is_zerotensor():
        return False
    if not torch._C._has_storage(x):
        return False
    # A trace would not see the kernels. Other modes may be on: compiled code first runs under one.
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    owner = _owner(x)
    return not (owner.is_leaf and owner.requires_grad) and is_dense(x)


def _backend(device: torch.device) -> str | None:
    try:
        return ops.choose_backend("pack_saved_spikes", None, device)
    except RuntimeError:  # none serves this device: its tensors are left alone
        return None


def _pack(x: Tensor, backend: str) -> Tensor | None:
    """The bits of a dense x, or None if it is not binary."""
    kernels: Any = reference if backend == "reference" else ops.kernels(backend)
    bits, binary = kernels.spike_pack(x, *_which(backend))
    return bits if binary else None


class _Memory(NamedTuple):
    alive: Any  # a weak reference to the storage, which takes this from the list when it dies
    pieces: dict[Any, _Found]  # by offset, elements and dtype


@dataclass
class _Context:
    # By the address of a storage. What is known dies with the storage, so that the bits of freed
    # spikes are freed, and an address that is used again meets nothing old.
    memories: dict[int, _Memory]
    report: PackingReport = field(default_factory=PackingReport)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note(self, x: Tensor, found: _Found) -> None:
        storage = x.untyped_storage()
        address, memories = storage._cdata, self.memories
        memory = memories.get(address)
        if memory is None:
            forget = weakref.ref(storage, lambda _: memories.pop(address, None))
            memory = memories[address] = _Memory(forget, {})
        memory.pieces[x.storage_offset(), x.numel(), x.dtype] = found

    def find(self, x: Tensor, backend: str) -> _Found | None:
        memory = self.memories.get(x.untyped_storage()._cdata)
        if memory is not None:
            found = memory.pieces.get((x.storage_offset(), x.numel(), x.dtype))
            if found is not None and found.holds_for(x):
                return found
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return None  # whether x is binary cannot be asked here
        bits = _pack(x, backend)
        if bits is None:
            return None
        found = _Found(TensorWeakRef(_owner(x)), x._version, bits, (1, 1, x.numel()), False)
        self.note(x, found)
        return found

    def pack(self, x: Tensor) -> "_Packed | _Left":
        """What is kept instead of x. Autograd calls this, without recording."""
        backend = _backend(x.device) if _is_tried(x) else None
        found = None if backend is None else self.find(x, backend)
        if backend is None or found is None:
            with self.lock:
                self.report.left += 1
            # Detached: x may be the result of the very function that keeps it.
            return _Left(x.detach(), x._version)
        with self.lock:
            if found.from_lif:
                self.report.from_lif += 1
            else:
                self.report.by_pass += 1
            if not found.counted:
                found.counted = True
                self.report.bytes_before += x.nbytes
                self.report.bytes_after += found.bits.nbytes
        return _Packed(found.bits, found.sizes, x.dtype, x.shape, x.stride(), backend)


def _unpack(kept: _Packed | _Left) -> Tensor:
    if isinstance(kept, _Packed):
        return kept.unpack()
    x, version = kept
    # Autograd does not look where there are hooks.
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a tensor of {x.dtype} and shape {tuple(x.shape)} is at version "
            f"{x._version}; expected version {version} instead"
        )
    return x


class _Local(threading.local):
    context: _Context | None = None


_local = _Local()  # as autograd's hooks are: another thread is not inside this one's context


@contextmanager
def pack_saved_spikes() -> Iterator[PackingReport]:
    """Keeps the spikes of any forward pass inside as bits until the backward pass needs them.

        with tk.pack_saved_spikes() as report:
            loss = criterion(model(x), target)
        loss.backward()
        print(report)

    A dense floating tensor that autograd keeps (of a convolution, a linear layer, pooling, a
    product) is kept as bits, 16 times smaller in half precision, 32 in float32, if each of its
    elements is exactly 0 or 1. Gradients are the same bit for bit, and so are second derivatives.
    The backward pass may run inside or outside. Everything else is left alone: parameters, fewer
    than 256 elements, tensors with gaps or overlaps, subclasses, and what is not binary.

    Where the tensor is a result of `lif`, or a view of all of it, unchanged since, `lif` has
    written the bits in its own pass. What else might be spikes, such as the half-precision copies
    of autocast, is read by a packing pass: on the CPU it ends at the first element that is neither
    0 nor 1; on a GPU it costs a kernel and a synchronisation for each tensor, and is left out
    while a CUDA graph is captured. What several layers keep is packed once. A layer unpacks its
    input for the time of its backward step.

    A spike tensor's memory is freed as soon as nothing else holds it: a reference of the caller's
    keeps it as long. A checkpointed part (torch.utils.checkpoint) keeps its inputs as bits. A model
    compiled by torch.compile may be called inside; its kept spikes are packed by a pass. The
    context belongs to the thread that enters it, may be nested (the innermost report counts), and
    packs by the backend of `use_backend`; with "reference", by plain torch operations, slowly.

    Returns:
        As the context's value a report: `from_lif`, `by_pass` and `left` count saved tensors,
        `bytes_before` and `bytes_after` the memory of those kept as bits.

    Raises:
        RuntimeError: entered inside a function that torch.compile compiles; a backward pass through
            a tensor left alone that was changed in place since, as without the context.
    """
    # A callback waits where a function to be compiled runs as it is: it would compile the hooks.
    compiling = torch.compiler.is_compiling()
    if compiling or callable(torch._C._dynamo.eval_frame.get_eval_frame_callback()):
        raise RuntimeError(
            "pack_saved_spikes: torch.compile cannot compile it; enter it outside, around the call "
            "of the compiled function"
        )
    outer = _local.context
    context = _Context({} if outer is None else outer.memories)
    _local.context = context
    try:
        with torch.autograd.graph.saved_tensors_hooks(context.pack, _unpack):
            yield context.report
    finally:
        _local.context = outer
        if outer is None:
            context.memories.clear()


def active() -> bool:
    """True where the kernels of `lif` are to write their spikes as bits too."""
    if torch.compiler.is_compiling() or _local.context is None:
        return False
    return not transforming()  # vmap has no bits of a sample


def remember(spikes: Tensor, bits: Tensor, time_dim: int) -> None:
    """Notes inside `pack_saved_spikes` that `bits` are the dense spikes, [T, ceil(N / 8)]."""
    if torch.compiler.is_compiling():
        return
    context = _local.context
    if context is None or spikes.is_inference() or not _is_tried(spikes):
        return
    outer, steps, inner = sizes = fold(spikes, time_dim)
    assert bits.shape == (steps, -(-outer * inner // 8)) and bits.is_contiguous()
    found = _Found(TensorWeakRef(spikes), spikes._version, bits.detach(), sizes, True)
    context.note(spikes, found)
