"""Events of still images: where, when and of which sign."""

import pytest
import torch

from examples.saccades import saccades


def edge(bright_right):
    image = torch.zeros(1, 1, 12, 12)
    image[..., 6:] = 1
    return image if bright_right else image.flip(-1)


def test_shape_and_counts():
    images = torch.rand(3, 1, 8, 10)
    events = saccades(images, 5)
    assert events.shape == (3, 5, 2, 8, 10)
    assert (events >= 0).all() and (events == events.round()).all()
    assert (events.flatten(2).sum(-1) > 0).all()
    assert torch.equal(events, saccades(images, 5))


def test_an_even_image_makes_events_at_its_border_only():
    events = saccades(torch.full((1, 1, 16, 16), 0.5), 4)
    assert events[..., 3:-3, 3:-3].sum() == 0


def test_the_sign_is_that_of_the_change():
    """The view moves right first: what was dark left of a bright side turns bright."""
    for bright_right in (True, False):
        on, off = saccades(edge(bright_right), 6)[0, 0, :, 4:-4, 4:-4]
        assert (on.sum() > 0, off.sum() > 0) == (bright_right, not bright_right)


def test_what_comes_back_makes_as_many_events_of_both_signs():
    """The path ends where it began, so that each pixel's brightness does, within one event."""
    on, off = saccades(torch.rand(4, 1, 9, 9), 3).sum(1).unbind(1)
    assert (on - off).abs().max() <= 1


@pytest.mark.parametrize("contrast", [0.1, 0.4])
def test_contrast(contrast):
    """Half the contrast, twice the events, but for what is lost by rounding."""
    images = torch.rand(4, 1, 9, 9)
    few, many = (saccades(images, 3, contrast=c).sum() for c in (contrast, contrast / 2))
    assert 1.8 * few < many < 3 * few


def test_more_steps_than_moves_leave_no_frame_empty():
    assert (saccades(torch.rand(1, 1, 16, 16), 40).flatten(2).sum(-1) > 0).all()
