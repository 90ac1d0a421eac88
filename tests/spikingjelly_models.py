"""SpikingJelly's own networks, also where torchvision is not: they import it for a download."""

import sys
from types import ModuleType

import torch


def spikingjelly_models():
    """The modules sew_resnet and spiking_vgg."""
    missing = {}
    try:
        import torchvision  # noqa: F401
    except ImportError:
        utils = ModuleType("torchvision.models.utils")
        utils.load_state_dict_from_url = torch.hub.load_state_dict_from_url
        names = ("torchvision", "torchvision.models")
        missing = {name: ModuleType(name) for name in names} | {utils.__name__: utils}
    sys.modules.update(missing)
    try:
        from spikingjelly.activation_based.model import sew_resnet, spiking_vgg
    finally:
        for name in missing:
            del sys.modules[name]
    return sew_resnet, spiking_vgg
