"""Correlation lookup: the definition written out, on demand against the volume, gradients, edges, errors."""

import math

import pytest
import torch
import torch.nn.functional as F

from kinema.kernels import correlation_lookup
from kinema.kernels.correlation_lookup import (
    correlation_pyramid,
    feature_pyramid,
    volume_bytes,
    volume_lookup,
)


def _case(batch=2, channels=19, height=21, width=17, target=(23, 18), spread=6.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    fmap1 = torch.randn(batch, channels, height, width, generator=generator)
    fmap2 = torch.randn(batch, channels, *target, generator=generator)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    noise = spread * torch.randn(batch, 2, height, width, generator=generator)
    return fmap1, fmap2, torch.stack([x, y]) + noise


def _value(level, b, y, x):
    """Bilinear value of a map [B, h, w] at one point, by definition; 0 outside."""
    h, w = level.shape[1:]
    total = 0.0
    for yi in (math.floor(y), math.floor(y) + 1):
        for xi in (math.floor(x), math.floor(x) + 1):
            if 0 <= yi < h and 0 <= xi < w:
                total += (1 - abs(y - yi)) * (1 - abs(x - xi)) * level[b, yi, xi].item()
    return total


def test_windows_follow_the_definition():
    fmap1, fmap2, coords = _case(batch=1, channels=3, height=3, width=4, target=(9, 11), spread=3.0)
    radius, levels = 2, 3
    found = correlation_lookup(fmap1, feature_pyramid(fmap2, levels), coords, radius)
    width = 2 * radius + 1
    assert found.shape == (1, levels * width * width, 3, 4)
    for row, column in ((0, 0), (2, 3), (1, 2)):
        products = (fmap1[0, :, row, column, None, None] * fmap2[0]).sum(0)[None] / math.sqrt(3)
        channel = 0
        for level in range(levels):
            volume = products if level == 0 else F.avg_pool2d(products, 2**level)
            x, y = (coords[0, :, row, column] / 2**level).tolist()
            for dx in range(-radius, radius + 1):
                for dy in range(-radius, radius + 1):
                    expected = _value(volume, 0, y + dy, x + dx)
                    assert found[0, channel, row, column].item() == pytest.approx(expected, abs=1e-5)
                    channel += 1


@pytest.mark.parametrize("radius", [1, 3, 4])
@pytest.mark.parametrize("sizes", [((21, 17), (23, 18)), ((8, 8), (8, 8)), ((13, 31), (63, 9))])
def test_on_demand_equals_the_volume(sizes, radius):
    fmap1, fmap2, coords = _case(height=sizes[0][0], width=sizes[0][1], target=sizes[1])
    whole = volume_lookup(correlation_pyramid(fmap1, fmap2), coords, radius)
    on_demand = correlation_lookup(fmap1, feature_pyramid(fmap2), coords, radius)
    assert on_demand.shape == whole.shape and on_demand.dtype == torch.float32
    assert (on_demand - whole).abs().max() < 1e-5 * whole.abs().max()


def test_volume_lookup_equals_grid_sampling():
    """The published formulation: align_corners True, zeros outside, x as the outer window axis."""
    fmap1, fmap2, coords = _case(batch=1, height=11, width=13, target=(16, 24))
    pyramid = correlation_pyramid(fmap1, fmap2)
    offsets = torch.arange(-3.0, 4.0)
    delta = torch.stack(torch.meshgrid(offsets, offsets, indexing="ij"), -1)  # [x, y, 2]
    rows = []
    for level, volume in enumerate(pyramid):
        points = coords.permute(0, 2, 3, 1).reshape(-1, 1, 1, 2) / 2**level + delta
        size = torch.tensor([volume.shape[-1], volume.shape[-2]])
        grid = 2 * points / (size - 1) - 1
        rows.append(F.grid_sample(volume[0, :, None], grid, align_corners=True).flatten(1))
    expected = torch.cat(rows, 1).view(1, 11, 13, -1).permute(0, 3, 1, 2)
    found = volume_lookup(pyramid, coords, 3)
    assert (found - expected).abs().max() < 2e-5 * expected.abs().max()


def test_gradients_of_both_ways_agree_and_are_those_of_the_definition():
    fmap1, fmap2, coords = (t.double() for t in _case(batch=1, channels=4, height=5, width=4, target=(9, 8)))
    weight = torch.randn(1, 4 * 9, 5, 4)
    gradients = []
    for look_up in (
        lambda a, b, c: volume_lookup(correlation_pyramid(a, b), c, 1),
        lambda a, b, c: correlation_lookup(a, feature_pyramid(b), c, 1),
    ):
        leaves = [t.float().requires_grad_() for t in (fmap1, fmap2, coords)]
        (look_up(*leaves) * weight).sum().backward()
        assert leaves[2].grad is None  # as published: positions carry no gradient
        gradients.append([leaf.grad for leaf in leaves[:2]])
    for whole, on_demand in zip(*gradients, strict=True):
        assert (whole - on_demand).abs().max() < 1e-5 * whole.abs().max()
    step, direction = 1e-2, torch.randn(1, 4, 9, 8)

    def total(b):
        return (volume_lookup(correlation_pyramid(fmap1.float(), b), coords.float(), 1) * weight).sum()

    numeric = (total(fmap2.float() + step * direction) - total(fmap2.float() - step * direction)) / (2 * step)
    assert numeric.item() == pytest.approx((gradients[0][1] * direction).sum().item(), rel=1e-3)


@pytest.mark.parametrize("far", [-1e4, 1e4, -1e20, 1e20, 60.0, -60.0])
def test_far_outside_is_zero(far):
    fmap1, fmap2, coords = _case()
    coords = torch.full_like(coords, far)
    assert (correlation_lookup(fmap1, feature_pyramid(fmap2), coords, 3) == 0).all()
    assert (volume_lookup(correlation_pyramid(fmap1, fmap2), coords, 3) == 0).all()


def test_memory_outside_the_maps_is_not_read():
    """Maps cut out of nan-filled storage, with strides: windows at the border stay finite."""
    fmap1, fmap2, coords = _case()
    stores = [torch.full((2, 19, s.shape[2] + 4, 2 * s.shape[3] + 4), math.nan) for s in (fmap1, fmap2)]
    views = [
        store[:, :, 2 : 2 + t.shape[2], 2 : 2 + 2 * t.shape[3] : 2]
        for store, t in zip(stores, (fmap1, fmap2), strict=True)
    ]
    for view, t in zip(views, (fmap1, fmap2), strict=True):
        view.copy_(t)
    found = correlation_lookup(views[0], feature_pyramid(views[1]), coords, 3)
    assert torch.allclose(found, correlation_lookup(fmap1, feature_pyramid(fmap2), coords, 3), atol=1e-6)


def test_half_precision_features_are_accumulated_in_float32():
    fmap1, fmap2, coords = _case()
    half = [t.bfloat16() for t in (fmap1, fmap2)]
    found = volume_lookup(correlation_pyramid(*half), coords, 3)
    exact = volume_lookup(correlation_pyramid(*(t.float() for t in half)), coords, 3)
    assert found.dtype == torch.float32 and torch.equal(found, exact)


def test_memory_of_the_volume_is_known_beforehand():
    fmap1, fmap2, _ = _case(height=23, width=18)
    pyramid = correlation_pyramid(fmap1, fmap2)
    assert volume_bytes(2, 23, 18) == sum(4 * level.numel() for level in pyramid)


def test_bad_arguments_are_named():
    fmap1, fmap2, coords = _case()
    pyramid = feature_pyramid(fmap2)
    with pytest.raises(ValueError, match="batch size and channels"):
        correlation_lookup(fmap1[:, :5], pyramid, coords, 3)
    with pytest.raises(ValueError, match="batch size and channels"):
        correlation_pyramid(fmap1[:1], fmap2)
    with pytest.raises(ValueError, match="one \\(x, y\\) per pixel"):
        correlation_lookup(fmap1, pyramid, coords[..., 1:], 3)
    with pytest.raises(ValueError, match="impl='cuda'"):
        correlation_lookup(fmap1, pyramid, coords, 3, impl="cuda")
    with pytest.raises(ValueError, match="at least 8"):
        feature_pyramid(fmap2[..., :7])
