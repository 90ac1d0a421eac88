"""The backends by name, and for each operator whether a backend can serve it, or why not."""

from . import native

OPERATORS = ("lif", "trt_penalty", "temporal_loss")
NAMES = ("cpu", "cuda", "triton", "reference")


def why_not(backend: str, operator: str) -> str | None:
    """The reason why `backend` cannot serve `operator` on this machine, or None if it can."""
    if backend == "reference":
        return None
    if backend == "cpu":
        return native.why_no_cpu()
    if backend == "cuda":
        if operator != "lif":
            return f"the CUDA kernel of {operator} is not part of this version"
        return native.why_no_cuda()
    return "Triton kernels are not part of this version"
