"""torchvision, also beside a torch whose build lacks its C++ operators; the data sets need none."""

import importlib
from unittest import mock

import pytest
import torch


def torchvision():
    """The package, imported. Skips the test where it is not installed.

    The wheel of another build of torch cannot register its operators; it is imported without the
    fake kernels that it would give them.
    """
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("needs torchvision")
    with mock.patch.object(torch.library, "register_fake", lambda *_, **__: lambda f: f):
        return importlib.import_module("torchvision")
