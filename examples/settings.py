"""The settings that the paper's results were made with (method.md's table), by data set.

Source: arXiv 2506.19256 and the commands in its official code's README. CIFAR100 is trained there
as CIFAR10 is. The digits and their event streams are this project's, for machines without data.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """How a data set is trained on, unless the command line says otherwise."""

    network: str  # of `networks.NETWORKS`
    steps: int  # T
    weight: float  # λ of TRT
    delta: float  # δ of TRT
    mse_ratio: float  # η of TRT; λ of TET
    tau: float = 2.0
    epochs: int = 300
    batch_size: int = 64
    lr: float = 1e-3  # the first of Adam's, which falls to 0 by a cosine


SETTINGS = {
    "cifar10": Settings("resnet19", 6, 1e-5, 0.25, 0.05),
    "cifar100": Settings("resnet19", 6, 1e-5, 0.25, 0.05),
    "imagenet100": Settings("sew-resnet34", 4, 5e-5, 0.5, 0.001, tau=1.0),
    "dvs-cifar10": Settings("vggsnn", 10, 5e-5, 0.5, 0.001),
    "n-caltech101": Settings("vggsnn", 10, 5e-5, 0.5, 0.05),
    "digits": Settings("small", 6, 1e-5, 0.25, 0.05, epochs=15, lr=2e-3),
    "digit-events": Settings("small", 10, 5e-5, 0.5, 0.001, epochs=15, lr=2e-3),
}
