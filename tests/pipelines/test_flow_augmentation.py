"""RAFT's augmentation: flow and validity follow exactly on analytic fields; draws repeat; colour leaves flow alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from kinema.configs.models.flow_augmentation import FlowAugmentationConfig
from kinema.models.flow.geometry import warp
from kinema.pipelines.scenes import Scene
from kinema.pipelines.train.flow_augmentation import KnownPair, augment
from kinema.pipelines.train.flow_augmentation.photometric import erased, jitter, recoloured
from kinema.pipelines.train.flow_augmentation.spatial import mirrored, randomly_cropped, resized, resized_sparse

PLAIN = FlowAugmentationConfig()
SIZE = (60, 82)
SLOPE, OFFSET = np.array([[0.11, -0.03], [0.02, -0.07]]), np.array([3.0, -1.5])


def field(x, y):
    """An affine motion at positions (x, y)."""
    return np.einsum("ij,j...->i...", SLOPE, np.stack([x, y])) + OFFSET[:, None, None]


def affine_pair(size=SIZE, holes=0.0):
    """Frames whose red and green are the pixel's own position, so that a frame says where it came from."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float64)
    image = np.stack([x, y, np.zeros_like(x)], -1).astype(np.uint8)
    valid = np.random.default_rng(0).random(size) >= holes
    return KnownPair.of(image, image, np.where(valid, field(x, y), np.nan).astype(np.float32))


def positions(size, height, width):
    """Where the pixels of the new size lie in the old."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    return (x + 0.5) * size[1] / width - 0.5, (y + 0.5) * size[0] / height - 0.5


@pytest.mark.parametrize("holes", [0.0, 0.1])
@pytest.mark.parametrize("size", [(97, 131), (60, 131), (41, 50), (60, 82)])
def test_scaled_flow_is_the_scaled_field(size, holes):
    found = resized(affine_pair(holes=holes), *size)
    x, y = positions(SIZE, *size)
    scale = np.array([size[1] / SIZE[1], size[0] / SIZE[0]])
    wanted = field(x, y) * scale[:, None, None]
    assert found.valid.mean() > (0.9 if not holes else 0.4)
    assert np.abs(found.flow_px - wanted)[:, found.valid].max() < 1e-4
    inside = (x >= 0) & (x <= SIZE[1] - 1) & (y >= 0) & (y <= SIZE[0] - 1)
    assert (found.valid <= inside).all()
    if not holes:
        assert (found.valid == inside).all()
    assert not found.flow_px[:, ~found.valid].any()
    # Images are sampled at the same places, up to the rounding to bytes and the interpolation's own.
    assert np.abs(found.image1[..., 0] - x)[inside].max() < 1.01
    assert np.abs(found.image1[..., 1] - y)[inside].max() < 1.01


@pytest.mark.parametrize("size", [(97, 133), (41, 56)])
def test_sparse_flow_goes_unblended_to_the_nearest_pixel(size):
    pair = affine_pair(holes=0.97)
    found = resized_sparse(pair, *size)
    scale = np.array([size[1] / SIZE[1], size[0] / SIZE[0]])
    rows, columns = np.nonzero(pair.valid)
    x, y = (columns + 0.5) * scale[0] - 0.5, (rows + 0.5) * scale[1] - 0.5
    place = np.rint(y).astype(int), np.rint(x).astype(int)
    assert found.valid[place].all() and found.valid.sum() == len(set(zip(*place, strict=True)))
    distance = np.hypot(y - place[0], x - place[1])
    for i in range(len(rows)):
        rivals = [j for j in range(len(rows)) if (place[0][j], place[1][j]) == (place[0][i], place[1][i])]
        nearest = min(rivals, key=lambda j: distance[j])
        wanted = pair.flow_px[:, rows[nearest], columns[nearest]] * scale
        np.testing.assert_allclose(found.flow_px[:, place[0][i], place[1][i]], wanted, rtol=1e-6)


@pytest.mark.parametrize(("horizontal", "vertical"), [(True, False), (False, True), (True, True)])
def test_mirrored_flow_is_the_mirrored_field(horizontal, vertical):
    pair = affine_pair(holes=0.2)
    found = mirrored(pair, horizontal, vertical)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]].astype(np.float64)
    source_x = SIZE[1] - 1 - x if horizontal else x
    source_y = SIZE[0] - 1 - y if vertical else y
    wanted = field(source_x, source_y) * np.array([-1.0 if horizontal else 1, -1.0 if vertical else 1])[:, None, None]
    assert np.abs(found.flow_px - wanted)[:, found.valid].max() < 1e-5
    assert (found.image1[..., 0] == source_x).all() and (found.image1[..., 1] == source_y).all()
    assert found.valid.sum() == pair.valid.sum()


def test_crops_take_the_same_window_everywhere():
    pair = affine_pair()
    for seed in range(20):
        found = randomly_cropped(pair, (20, 30), np.random.default_rng(seed), margins=(20, 50))
        left, top = found.image1[0, 0, :2].astype(int)
        assert 0 <= left <= 52 and 0 <= top <= 40
        assert np.array_equal(found.flow_px, pair.flow_px[:, top : top + 20, left : left + 30])
        assert np.array_equal(found.image2, found.image1) and found.valid.shape == (20, 30)
    with pytest.raises(ValueError, match="smaller than the crop"):
        randomly_cropped(pair, (61, 30), np.random.default_rng(0))


def rendered_pair():
    scene = Scene(seed=5, height=120, width=160, num_frames=2, speed_px=5.0)
    first, second = list(scene.frames())
    flow, occluded = scene.motion(0, 1)
    return KnownPair.of(first, second, np.asarray(flow, np.float32), ~np.asarray(occluded))


@pytest.mark.parametrize("variant", ["dense", "sparse"])
def test_augmented_flow_still_explains_the_frames(variant):
    """On rendered frames, through all of it but colour and eraser: frame 2, warped, is frame 1."""
    config = dataclasses.replace(
        PLAIN, brightness=0, contrast=0, saturation=0, hue=0, eraser_prob=0, flip_vertical=0.5, scale_prob=1.0
    )
    pair = rendered_pair()
    for seed in range(12):
        found = augment(pair, variant, config, (96, 112), np.random.default_rng(seed))
        assert found.size == (96, 112) and found.image1.shape == found.image2.shape == (96, 112, 3)
        first, second = (
            torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
            for image in (found.image1, found.image2)
        )
        warped, inside = warp(second, torch.from_numpy(np.ascontiguousarray(found.flow_px))[None])
        counted = inside[0].numpy() & found.valid
        moved, still = ((a - first).abs().mean(1)[0].numpy()[counted].mean() for a in (warped, second))
        assert moved < 0.5 * still


def test_a_generators_state_is_all_that_decides():
    pair = rendered_pair()
    one, again, other = (augment(pair, "dense", PLAIN, (96, 112), np.random.default_rng(seed)) for seed in (3, 3, 4))
    for name in ("image1", "image2", "flow_px", "valid"):
        assert np.array_equal(getattr(one, name), getattr(again, name))
    assert not np.array_equal(one.image1, other.image1)


def test_pairs_smaller_than_the_crop_are_enlarged():
    found = augment(affine_pair(), "dense", PLAIN, (128, 128), np.random.default_rng(0))
    assert found.size == (128, 128)


def test_off_means_a_crop_and_nothing_else():
    pair = affine_pair()
    found = augment(pair, "off", PLAIN, (60, 82), np.random.default_rng(0))
    assert all(np.array_equal(getattr(found, n), getattr(pair, n)) for n in ("image1", "image2", "flow_px", "valid"))


def test_symmetric_colours_are_alike_and_asymmetric_ones_are_not():
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    pair = KnownPair.of(image, image.copy(), np.zeros((2, 40, 50), np.float32))
    always = dataclasses.replace(PLAIN, asymmetric_prob=1.0)
    for seed in range(5):
        alike = recoloured(pair, dataclasses.replace(PLAIN, asymmetric_prob=0.0), np.random.default_rng(seed))
        sparse = recoloured(pair, always, np.random.default_rng(seed), alike=True)
        apart = recoloured(pair, always, np.random.default_rng(seed))
        assert np.array_equal(alike.image1, alike.image2) and np.array_equal(sparse.image1, sparse.image2)
        assert not np.array_equal(alike.image1, image) and not np.array_equal(apart.image1, apart.image2)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_colour_change_is_what_it_is_called(name):
    """One change at a time, against its definition."""
    zero = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0)
    config = dataclasses.replace(PLAIN, **{**zero, name: 0.3})
    image = np.random.default_rng(1).integers(60, 150, (30, 40, 3), dtype=np.uint8)
    found = jitter(image, config, np.random.default_rng(7)).astype(float)
    grey = np.array([0.299, 0.587, 0.114])
    before, after = image @ grey, found @ grey
    if name == "brightness":
        ratio = found / image
        assert ratio.std() < 0.01 and abs(ratio.mean() - 1) > 0.02
    elif name == "contrast":
        assert abs(after.mean() - before.mean()) < 0.5 and abs(after.std() / before.std() - 1) > 0.02
    elif name == "saturation":
        assert np.abs(after - before).max() < 1.0
        assert abs((found - after[..., None]).std() / (image - before[..., None]).std() - 1) > 0.02
    else:
        assert np.abs(found.max(-1) - image.max(-1)).max() <= 1 and np.abs(found.min(-1) - image.min(-1)).max() <= 1
        assert np.abs(found - image).mean() > 2
    untouched = jitter(image, dataclasses.replace(PLAIN, **zero), np.random.default_rng(7))
    assert np.abs(untouched.astype(int) - image).max() <= 1


def test_the_eraser_paints_the_second_frame_alone():
    image = np.random.default_rng(0).integers(0, 256, (120, 150, 3), dtype=np.uint8)
    pair = KnownPair.of(image, image.copy(), np.zeros((2, 120, 150), np.float32))
    sizes = []
    for seed in range(20):
        found = erased(
            pair, dataclasses.replace(PLAIN, eraser_prob=1.0, eraser_px=(20, 30)), np.random.default_rng(seed)
        )
        changed = (found.image2 != image).any(-1)
        sizes.append(changed.sum())
        assert np.array_equal(found.image1, image)
        assert (found.image2[changed] == np.rint(image.reshape(-1, 3).mean(0))).all()
    assert 0 < max(sizes) <= 2 * 30 * 30 and np.median(sizes) > 300
    assert erased(pair, dataclasses.replace(PLAIN, eraser_prob=0.0), np.random.default_rng(0)) is pair


@pytest.mark.parametrize(
    "wrong",
    [{"scale_log2": (0.5, -0.2)}, {"stretch_prob": 1.5}, {"hue": 0.6}, {"brightness": 1.0}, {"eraser_px": (0, 10)}],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"augmentation.{next(iter(wrong))}=.*out of range"):
        FlowAugmentationConfig(**wrong)
