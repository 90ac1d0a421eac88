"""What is installed here and what runs: the first thing to look at when something is slow."""

import platform
from dataclasses import dataclass
from typing import Any

import torch

from . import backends
from .backends import native
from .version import __version__


@dataclass(frozen=True)
class Report:
    """Versions and settings, and for each backend and operator None or why it cannot run."""

    versions: dict[str, str]
    settings: dict[str, str]
    unavailable: dict[str, dict[str, str | None]]

    def __str__(self) -> str:
        width = max(map(len, (*self.versions, *self.settings))) + 2
        lines = [f"{name:{width}}{value}" for name, value in self.versions.items()]
        lines += [f"{name:{width}}{value}" for name, value in self.settings.items()]
        for backend, operators in self.unavailable.items():
            lines.append("")
            for operator, reason in operators.items():
                answer = "available" if reason is None else f"no: {reason}"
                lines.append(f"{backend:<11}{operator:<15}{answer}")
        return "\n".join(lines)


def report() -> Report:
    """The state of this installation; `python -m trt_kernels` prints it."""
    build: dict[str, Any] = {} if native._C is None else native._C.build_info()
    versions = {
        "trt_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": build.get("compiler", "none"),
        "cuda": build.get("cuda") or f"none ({build.get('cuda_missing', native.why_no_cpu())})",
    }
    settings = {
        "cuda architectures": build.get("cuda_architectures") or "none",
        "cpu level": "none",
        "openmp": "yes" if build.get("openmp") else "no: one thread",
        "threads": str(torch.get_num_threads()),
    }
    if native._C is not None:
        settings["cpu level"] = f"{native._C.cpu_level()} of {', '.join(native._C.cpu_levels())}"
    unavailable: dict[str, dict[str, str | None]] = {
        backend: dict.fromkeys(backends.OPERATORS, backends.why_not(backend))
        for backend in backends.NAMES
    }
    return Report(versions, settings, unavailable)
