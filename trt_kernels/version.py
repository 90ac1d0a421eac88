"""The version, which stands in pyproject.toml alone: that of the installed package."""

from importlib import metadata

try:
    __version__ = metadata.version("trt_kernels")
except metadata.PackageNotFoundError:  # a tree on the path that was never installed
    __version__ = "0+unknown"
