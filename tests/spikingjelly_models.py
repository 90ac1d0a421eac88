"""SpikingJelly's own networks, also where torchvision is not: they import it for a download."""

import sys
from types import ModuleType

import torch

from tests.torchvision_here import imported


def spikingjelly_models():
    """The modules sew_resnet and spiking_vgg."""
    missing = {}
    try:
        imported()
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


def spikingjelly_network(name):
    """One of SpikingJelly's networks for small images and ten classes, multi-step."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    sew_resnet, spiking_vgg = spikingjelly_models()
    if name == "sew_resnet18":
        net = sew_resnet.sew_resnet18(
            cnf="ADD",
            spiking_neuron=neuron.IFNode,
            surrogate_function=surrogate.ATan(),
            detach_reset=True,
            num_classes=10,
        )
    else:
        net = spiking_vgg.SpikingVGG(
            spiking_vgg.cfgs["A"],
            batch_norm=True,
            norm_layer=layer.BatchNorm2d,
            num_classes=10,
            spiking_neuron=neuron.LIFNode,
            tau=2.0,
            decay_input=False,
        )
        # Its 4,096 hidden units take their time, and change nothing about the neurons.
        net.avgpool = layer.AdaptiveAvgPool2d((1, 1))
        net.classifier = torch.nn.Sequential(layer.Linear(512, 10))
    functional.set_step_mode(net, "m")
    return net
