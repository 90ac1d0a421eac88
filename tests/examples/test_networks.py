"""The paper's networks: their sizes, and that they compute what the official formulation does."""

import pytest
import torch
from torch import nn

import trt_kernels as tk
from examples.networks import (
    NETWORKS,
    VGGSNN,
    ResNet19,
    SEWResNet34,
    SmallNet,
    SpikingNet,
    convolution,
)
from tests import official


def parameters(network):
    return sum(p.numel() for p in network.parameters())


def neurons(network):
    return [m for m in network.modules() if isinstance(m, tk.nn.LIF | tk.nn.BatchNormLIF)]


def neurons_a_sample(network, x):
    counts = []
    for layer in neurons(network):
        layer.register_forward_hook(lambda *call: counts.append(call[-1][0, 0].numel()))
    with torch.no_grad():
        network(x)
    return sum(counts)


def test_published_sizes():
    assert parameters(ResNet19()) == 12_630_858
    assert parameters(VGGSNN()) == 9_268_746
    assert parameters(SEWResNet34()) == 21_335_972
    assert [len(neurons(kind())) for kind in (ResNet19, VGGSNN, SEWResNet34)] == [18, 8, 36]
    assert neurons_a_sample(ResNet19(steps=1), torch.rand(1, 3, 32, 32)) == 1_376_512
    assert neurons_a_sample(VGGSNN(), torch.rand(1, 1, 2, 48, 48)) == 921_600


def test_published_neurons():
    for network in (ResNet19(tau=1.0), VGGSNN()):
        for layer in neurons(network):
            options = layer.lif_options
            assert options["charge"] == "divide" and options["threshold"] == 1.0
            assert options["decay"] == (1.0 if isinstance(network, ResNet19) else 0.5)
            assert options["reset"] == "hard" and options["v_reset"] == 0.0
            assert options["surrogate"] == tk.Triangle(1.0)
            assert not options.get("detach_reset", False)


def test_convolutions_begin_by_fan_out():
    """A variance of 2 over what a weight's input reaches: outputs times the kernel's area."""
    for inputs, outputs, kernel in ((8, 256, 3), (300, 40, 3), (64, 512, 1)):
        weight = convolution(inputs, outputs, kernel).weight.detach()
        assert weight.mean() == pytest.approx(0, abs=0.003)
        assert weight.std() == pytest.approx((2 / (outputs * kernel**2)) ** 0.5, rel=0.05)
    layers = [m.weight.detach() for m in ResNet19().modules() if isinstance(m, nn.Conv2d)]
    for weight in layers:
        assert weight.std() == pytest.approx((2 / weight[:, 0].numel()) ** 0.5, rel=0.1)


@pytest.mark.parametrize("name", NETWORKS)
def test_images_and_sequences(name):
    """An image is the sequence that repeats it, and is convolved once."""
    size = {"size": 16} if name in ("vggsnn", "small") else {}
    torch.manual_seed(0)
    network = NETWORKS[name](5, 3, channels=2, **size).eval()
    repeating = NETWORKS[name](5, None, channels=2, **size).eval()
    repeating.load_state_dict(network.state_dict())
    images = torch.rand(2, 2, 16, 16)
    convolved = []
    network.layers[0].conv.register_forward_hook(lambda *call: convolved.append(len(call[-1])))
    logits = network(images)
    assert logits.shape == (3, 2, 5)
    assert convolved == [2]
    torch.testing.assert_close(logits, repeating(images.expand(3, -1, -1, -1, -1)))
    logits.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


class Official(nn.Module):
    """A layer of the network, by the official code's operations on [B, T, *]."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.neurons = layer, official.LIFNode(1.0, 0.0, 2.0, "triangle", 1.0)


class OfficialConv(Official):
    def forward(self, x):
        norm = nn.BatchNorm2d(self.layer.neurons.num_features)
        norm.load_state_dict(self.layer.neurons.state_dict())
        layers = official.SeqToANNContainer(self.layer.conv, norm.train(self.training))
        return self.neurons(layers(x))


class OfficialBlock(Official):
    def forward(self, x):
        current = official.SeqToANNContainer(*self.layer.second)(
            OfficialConv(self.layer.first).train(self.training)(x)
        )
        shortcut = self.layer.shortcut
        if hasattr(shortcut, "neurons"):
            x = OfficialConv(shortcut).train(self.training)(x)
        elif len(list(shortcut.children())):
            x = official.SeqToANNContainer(*shortcut)(x)
        return self.neurons(current + x)


@pytest.mark.parametrize("spiking_shortcut", [False, True])
def test_layers_are_the_official_ones(spiking_shortcut):
    """In training, outputs and gradients, on the same input; sums round in another order."""
    network = SpikingNet(None)
    network.add_conv(2, 4)
    network.add_residuals(4, 6, 2, 2, spiking_shortcut)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | tk.nn.BatchNormLIF):
            nn.init.uniform_(module.weight, 0.5, 2)
    x = torch.randn(5, 3, 2, 12, 12)  # [T, B, C, H, W]
    for layer in network.layers:
        theirs = (OfficialConv if hasattr(layer, "conv") else OfficialBlock)(layer)
        results = []
        for module, dims in ((layer, (0, 1)), (theirs, (1, 0))):
            v = x.detach().clone().requires_grad_()
            out = module(v.movedim((0, 1), dims)).movedim(dims, (0, 1))
            wanted = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            (grad,) = torch.autograd.grad((out * wanted).sum(), v)
            results.append((out.detach(), grad))
        (ours, our_grad), (other, other_grad) = results
        assert 0.02 < ours.mean() < 0.9
        assert (ours != other).float().mean() <= 1e-4
        torch.testing.assert_close(our_grad, other_grad, rtol=1e-3, atol=1e-4)
        x = ours


def test_bad_input():
    with pytest.raises(ValueError, match=r"x: got shape \(2, 1, 8, 8\), needs \[T, B, C, H, W\]"):
        SmallNet(steps=None)(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"x: got shape \(2, 1, 8\), needs \[B, C, H, W\]"):
        SmallNet()(torch.rand(2, 1, 8))
    with pytest.raises(ValueError, match="size: got 40, needs a multiple of 16"):
        VGGSNN(size=40)
