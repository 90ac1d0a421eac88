"""What the GPU under measurement is."""

import subprocess
from importlib import metadata
from typing import Any

import torch

QUERY = ("name", "driver_version", "memory.total", "clocks.max.sm", "clocks.max.memory")


def nvidia_smi() -> dict[str, str]:
    """What the driver's tool says of the first GPU; nothing where there is no such tool."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {}
    return dict(zip(QUERY, (cell.strip() for cell in lines[0].split(",")), strict=False))


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


def gpu() -> dict[str, Any]:
    """Name, size, driver and versions of the current GPU."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "driver": nvidia_smi().get("driver_version", "unknown"),
        "memory": properties.total_memory,
        "l2": int(getattr(properties, "L2_cache_size", 0)),
        "processors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": str(torch.version.cuda),
        "torch": torch.__version__,
        "triton": version("triton"),
    }
