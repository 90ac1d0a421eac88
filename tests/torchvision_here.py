"""torchvision, also beside a torch whose build lacks its C++ operators; the data sets need none."""

import importlib
from unittest import mock

import pytest
import torch


def imported():
    """The package.

    The wheel for another build of torch cannot register its operators; it is imported without the
    fake kernels that it would give them.

    Raises:
        ImportError: it is not installed.
    """
    with mock.patch.object(torch.library, "register_fake", lambda *_, **__: lambda f: f):
        return importlib.import_module("torchvision")


def torchvision():
    """The package; skips the test where it is not installed."""
    try:
        return imported()
    except ImportError:
        pytest.skip("needs torchvision")
