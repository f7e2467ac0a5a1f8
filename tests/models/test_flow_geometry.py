"""Flow conversions: round trips, analytic motion, occlusion, colours."""

import math

import pytest
import torch

from kinema.models.flow import geometry
from kinema.models.flow.padding import Padding, padding_for


def _affine_flow(height, width):
    """A flow that is linear in position, so that resampling and warping are exact inside."""
    x, y = geometry.pixel_grid(height, width, like=torch.zeros(()))
    return torch.stack([0.1 * x - 0.05 * y + 1.0, 0.02 * x + 0.08 * y - 2.0])[None]


def test_numbers_that_the_device_writes_are_those_of_the_host():
    for dtype in (torch.float32, torch.float64, torch.float16):
        like = torch.zeros(3, 4, dtype=dtype)
        assert torch.equal(geometry.filled(like, 0.485, -1, 1 / 3), like.new_tensor([0.485, -1, 1 / 3]))


def test_units_have_known_values_and_round_trips():
    flow = torch.randn(2, 2, 30, 50)
    assert torch.equal(geometry.px_to_norm(flow)[:, 0], flow[:, 0] / 50)
    assert torch.equal(geometry.px_to_norm(flow)[:, 1], flow[:, 1] / 30)
    assert torch.equal(geometry.px_to_half(flow)[:, 0], flow[:, 0] * 2 / 50)
    assert torch.allclose(geometry.norm_to_px(geometry.px_to_norm(flow)), flow, atol=1e-6)
    assert torch.allclose(geometry.half_to_px(geometry.px_to_half(flow)), flow, atol=1e-6)
    corners = torch.tensor([[-0.5, -0.5], [49.5, 29.5], [24.5, 14.5]])
    norm = geometry.points_px_to_norm(corners, 30, 50)
    assert torch.allclose(norm, torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.5, 0.5]]))
    assert torch.allclose(geometry.points_norm_to_px(norm, 30, 50), corners, atol=1e-5)


def test_points_moved_by_flow_agree_in_both_units():
    point, motion = torch.tensor([12.0, 7.0]), torch.tensor([3.0, -2.0])
    flow = motion.view(2, 1, 1).expand(2, 30, 50)
    moved = geometry.points_px_to_norm(point, 30, 50) + geometry.px_to_norm(flow)[:, 7, 12]
    assert torch.allclose(moved, geometry.points_px_to_norm(point + motion, 30, 50))


# Averaging over a window keeps a linear field exactly only at whole ratios.
@pytest.mark.parametrize(("size", "antialias"), [((60, 100), True), ((15, 25), True), ((17, 61), False)])
def test_resized_flow_is_that_of_the_resized_scene(size, antialias):
    flow = _affine_flow(30, 50)
    resized = geometry.resize_flow(flow, *size, antialias=antialias)
    # The same physical motion at the same place, in other pixels, away from the clamped border.
    place = geometry.points_px_to_norm(geometry.pixel_grid(*size, like=flow).permute(1, 2, 0), *size)
    source = geometry.points_norm_to_px(place, 30, 50).permute(2, 0, 1)
    expected = torch.stack(
        [0.1 * source[0] - 0.05 * source[1] + 1.0, 0.02 * source[0] + 0.08 * source[1] - 2.0]
    ) * torch.tensor([size[1] / 50, size[0] / 30]).view(2, 1, 1)
    inner = (slice(None), slice(3, -3), slice(3, -3))
    assert torch.allclose(resized[0][inner], expected[inner], atol=1e-4)


def test_resize_there_and_back():
    flow = _affine_flow(32, 48)
    back = geometry.resize_flow(geometry.resize_flow(flow, 64, 96), 32, 48)
    assert torch.allclose(back[..., 2:-2, 2:-2], flow[..., 2:-2, 2:-2], atol=1e-4)


def test_sparse_resize_ignores_unknown_pixels():
    flow = torch.full((1, 2, 8, 8), 4.0)
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    valid[:, :, 4:] = False
    flow[..., 4:] = math.nan
    small, covered = geometry.resize_sparse_flow(flow, valid, 4, 4)
    assert torch.allclose(small[..., :2], torch.tensor(2.0), atol=1e-5)
    assert covered[0, :, :2].all() and not covered[0, :, 2:].any()
    assert (small[..., 2:] == 0).all()


def test_crops_flips_and_padding_are_undone():
    flow = torch.randn(1, 2, 20, 30)
    padding = Padding(1, 2, 3, 4)
    assert torch.equal(padding.unpad(geometry.pad_flow(flow, padding)), flow)
    for flips in ({"horizontal": True}, {"vertical": True}, {"horizontal": True, "vertical": True}):
        assert torch.equal(geometry.flip_flow(geometry.flip_flow(flow, **flips), **flips), flow)
    assert torch.equal(geometry.crop_flow(flow, 2, 3, 10, 12), flow[..., 2:12, 3:15])
    with pytest.raises(ValueError, match="leaves the 20x30 flow"):
        geometry.crop_flow(flow, 12, 3, 10, 12)


def test_flow_explains_mirrored_and_separately_cropped_frames(fill):
    """Warping the transformed second frame by the transformed flow gives the transformed first frame."""
    first = fill.image(0, "scene", 1, 40, 60)
    second = fill.image(0, "scene", 1, 40, 60, shift=(3.0, -2.0))
    flow = torch.tensor([3.0, -2.0]).view(1, 2, 1, 1).expand(1, 2, 40, 60)
    cases = [
        (first, second, flow),
        (first.flip(-1), second.flip(-1), geometry.flip_flow(flow, horizontal=True)),
        (first.flip(-2), second.flip(-2), geometry.flip_flow(flow, vertical=True)),
        (
            first[..., 5:25, 8:40],
            second[..., 3:23, 10:42],
            geometry.crop_flow(flow, 5, 8, 20, 32, second_top_left=(3, 10)),
        ),
    ]
    for one, two, motion in cases:
        warped, valid = geometry.warp(two, motion)
        assert 0.8 < valid.float().mean() <= 1
        assert ((warped - one).abs().amax(1)[valid]).max() < 1e-4


def test_warp_marks_targets_outside_and_survives_unknown_flow():
    flow = torch.zeros(1, 2, 4, 5)
    flow[0, 0, 0, 0], flow[0, 0, 0, 1], flow[0, 1, 0, 2], flow[0, 0, 0, 3] = -0.5, 1e10, math.nan, 1.0
    warped, valid = geometry.warp(torch.rand(1, 3, 4, 5), flow)
    assert valid[0, 0].tolist() == [False, False, False, True, True] and valid[0, 1:].all()
    assert torch.isfinite(warped).all()
    assert geometry.warp(torch.rand(1, 1, 1, 1), torch.zeros(1, 2, 1, 1))[1].all()


def test_occlusion_of_a_square_moving_over_a_still_background():
    forward, backward = torch.zeros(1, 2, 20, 30), torch.zeros(1, 2, 20, 30)
    forward[0, 0, 5:15, 5:12] = 6.0
    backward[0, 0, 5:15, 11:18] = -6.0
    hidden = torch.zeros(20, 30, dtype=torch.bool)
    hidden[5:15, 12:18] = True  # background that the square comes to cover
    assert torch.equal(geometry.occlusion(forward, backward)[0], hidden)


def test_leaving_the_frame_counts_as_occluded():
    forward = torch.zeros(1, 2, 6, 8)
    forward[:, 0] = 2.0
    assert geometry.occlusion(forward, -forward)[0].any(0).tolist() == [False] * 6 + [True] * 2


def test_colours_tell_direction_and_length():
    flow = torch.zeros(2, 1, 6)
    flow[0, 0, :4] = torch.tensor([1.0, -1.0, 0.5, 0.0])
    flow[:, 0, 4], flow[1, 0, 5] = math.nan, 1e10
    picture = geometry.flow_to_colour(flow)[0]
    right, left, half, still, unknown, marked = picture.tolist()
    assert right == [255, 0, 0] and left[0] == 0 and left[2] > 200
    assert half[0] == 255 and 120 <= half[1] <= 130
    assert still == [255, 255, 255] and unknown == marked == [0, 0, 0]
    assert geometry.flow_to_colour(flow[:, :, :1], max_px=0.5)[0, 0].tolist() == [191, 0, 0]


@pytest.mark.parametrize("mode", ["sintel", "kitti"])
@pytest.mark.parametrize("size", [(1, 1), (100, 37), (127, 129), (128, 128), (375, 1242), (436, 1024)])
def test_padding_reaches_multiples_and_the_minimum(size, mode):
    padding = padding_for(*size, mode=mode)
    image = torch.rand(1, 3, *size)
    padded = padding.pad(image)
    assert list(padded.shape[-2:]) == [max(128, -(-side // 8) * 8) for side in size]
    assert torch.equal(padding.unpad(padded), image)
    assert 0 <= padding.right - padding.left <= 9  # a cell and a pixel at most
    if size[0] > 128 and mode == "kitti":
        assert padding.top == 0
    if mode == "sintel":
        assert 0 <= padding.bottom - padding.top <= 9
