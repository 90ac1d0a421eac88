"""Event streams made from still images: what an event camera sees while it moves over them.

As N-MNIST and N-Caltech101 were recorded (Orchard et al. 2015, arXiv 1507.07629): the view makes
three saccades, the sides of a triangle. A pixel of the camera sends an ON event whenever its log
brightness has risen by `contrast` since its last event, and an OFF event whenever it has fallen by
as much. Nothing is random: the same images give the same events.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def saccades(
    images: Tensor, steps: int, *, amplitude: float = 2.0, contrast: float = 0.2, moves: int = 3
) -> Tensor:
    """Images [N, 1, H, W] in [0, 1] -> how many events, [N, T, 2, H, W]: ON, then OFF.

    Args:
        steps: T frames of equal duration.
        amplitude: of the saccades, in pixels.
        contrast: change of the log brightness that makes an event.
        moves: how many small moves a frame is made of.
    """
    corners = torch.tensor([[0.0, 0.0], [0.5, 1.0], [1.0, 0.0], [0.0, 0.0]]) * amplitude
    way = torch.linspace(0, 3, steps * moves + 1)[1:]
    start = way.ceil().long() - 1
    path = torch.lerp(corners[start], corners[start + 1], (way - start)[:, None])

    # Brightness is never quite 0: the logarithm needs light.
    seen = view(images, corners[0]).add(0.1).log()
    frames = torch.zeros(steps, 2, *images.shape)
    for move, position in enumerate(path.tolist()):
        change = view(images, torch.tensor(position)).add(0.1).log() - seen
        events = (change / contrast).trunc()
        seen += events * contrast
        frame = frames[move // moves]
        frame[0] += events.clamp(min=0)
        frame[1] += events.neg().clamp(min=0)
    return frames.squeeze(3).permute(2, 0, 1, 3, 4).contiguous()


def view(images: Tensor, position: Tensor) -> Tensor:
    """The images as seen from a position, in pixels; between pixels by interpolation."""
    height, width = images.shape[-2:]
    shift = 2 * position / torch.tensor([width, height])
    theta = torch.cat([torch.eye(2), shift[:, None]], 1).expand(len(images), 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
