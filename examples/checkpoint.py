"""Checkpoints that are either whole or not there, and that are read with suspicion."""

import os
import zipfile
from pathlib import Path
from typing import Any

import torch

FORMAT = "trt_kernels training 2"


class CheckpointError(Exception):
    """A checkpoint that cannot be used, and why."""


def save(path: Path, content: dict[str, Any]) -> None:
    """Writes a checkpoint in the place of another, which stays until this one is on the disk.

    An interruption at any moment leaves the old one or the new one, and never half of it.
    """
    write(path, {"format": FORMAT, **content})


def write(path: Path, content: Any, ending: str = ".part") -> None:
    """Puts a file of `torch.save` in its place when all of it is on the disk.

    `ending`: of the name that it has until then; processes that write the same file differ in it.
    """
    part = path.with_name(path.name + ending)
    try:
        with part.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def load(path: Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. It is checked first, and nothing in it is executed.

    Raises:
        CheckpointError: it is missing, damaged, or not one of these.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load compares no checksums
        if damaged is None:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damage shows in many ways
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: damaged, or no checkpoint ({reason})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged ({damaged} has another checksum)")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this training")
    return content
