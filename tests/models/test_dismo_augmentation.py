"""DisMo's augmentation and target offsets: the published code's numbers, and batches that equal single clips."""

import numpy as np
import pytest
import torch

from kinema.models.dismo.augmentation import (
    CONTENT_COLOURS,
    MOTION_COLOURS,
    MOTION_WARP,
    ColourRule,
    WarpRule,
    change_colours,
    draw_colours,
    draw_warp,
    inverse_affine,
    warp_clips,
)
from kinema.models.dismo.target_offset import clip_frames, draw_target, nearest_frames, offset_probabilities

TOLERANCE = 2e-5


def warp_rule(case):
    """A recorded case in our terms."""
    size = case["size"] if isinstance(case["size"], list) else [case["size"]] * 2
    ranges = {
        name: tuple(case[name]) for name in ("scale", "aspect_ratio", "translate", "angle", "shear") if name in case
    }
    limits = (case["min_aspect_ratio"], case["max_aspect_ratio"]) if "max_aspect_ratio" in case else None
    return WarpRule(tuple(size), case.get("random_crop", False), aspect_limits=limits, **ranges)


@pytest.mark.parametrize(
    "name", ["crop_ar_only", "rotate", "scale_translate_shear", "zeros_padding", "random_crop", "content_crop"]
)
def test_warps(name, golden, fill):
    expected = golden("dismo_geometric__s0")
    case = expected.meta["cases"][name]
    rule = warp_rule(case)
    generator = torch.Generator().manual_seed(case.get("gen_seed", 0))
    frames = fill.image(0, "frames", 2, 60, 90)
    maps = draw_warp(rule, 60, 90, generator)[None]
    found = warp_clips(frames[None], maps, rule.size, case.get("padding_mode", "border"))
    expected.check(name, found[0], atol=TOLERANCE, rtol=0)


def test_affine_matrices(golden):
    """Warps use the inverses. The forward matrices that the published code can make exchange the two scales."""
    expected = golden("dismo_affine_matrices")
    matrices = []
    for case in expected.meta["inputs"]:
        given = {name: tuple(value) for name, value in case.items() if isinstance(value, list)}
        inverse = inverse_affine(
            given["center"], case["angle_deg"], given["translate"], given["scale_xy"], given["shear_deg"]
        )
        exchanged = inverse_affine(
            given["center"], case["angle_deg"], given["translate"], given["scale_xy"][::-1], given["shear_deg"]
        )
        square = torch.cat([exchanged, torch.tensor([[0.0, 0.0, 1.0]])]).double()
        matrices.append(torch.stack([inverse.flatten(), torch.linalg.inv(square)[:2].flatten().float()]))
    expected.check("matrices", torch.stack(matrices), atol=0, rtol=TOLERANCE)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue", "all_shuffled"])
def test_colours(name, golden, fill):
    expected = golden("dismo_photometric__s0")
    case = dict(expected.meta["cases"][name])
    generator = torch.Generator().manual_seed(case.pop("gen_seed", 0))
    change = draw_colours(ColourRule(**{key: tuple(limits) for key, limits in case.items()}), generator)
    found = change_colours(fill.image(0, "frames", 2, 40, 52)[None], [change])
    expected.check(name, found[0], atol=TOLERANCE, rtol=0)


def test_both_on_uint8_frames(golden, fill):
    """The recorded pipeline: to 0..1, warp (turned by 10 degrees), colours (brightness 1.3), rounded to uint8."""
    frames = (fill.image(0, "frames", 2, 40, 52) * 255).round() / 255
    maps = draw_warp(WarpRule((40, 40), angle=(10.0, 10.0)), 40, 52, torch.Generator())[None]
    bright = change_colours(warp_clips(frames[None], maps, (40, 40)), [(("brightness", 1.3),)])
    expected = golden("dismo_photometric__s0")
    expected.check("full_uint8_pipeline", (bright[0] * 255).round(), atol=0, rtol=0)


@pytest.mark.parametrize(("fps", "stride"), [(24, 4), (30, 5), (25, 4)])
def test_target_offsets(fps, stride, golden):
    found = offset_probabilities(torch.arange(4 * stride + 1) / fps)
    golden("dismo_delta_time_probs").check(f"prob_fps{fps}_stride{stride}", found, atol=1e-7, rtol=1e-6)


def test_targets_follow_their_probabilities_and_their_seed():
    times = np.arange(40) / 24
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_target(times, 5, 4 / 6, generator) - 5 for _ in range(5000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=17) / len(drawn)
    assert (shares - offset_probabilities(torch.arange(17) / 24)).abs().max() < 0.02 and shares[0] == 0
    assert len(shares) == 17
    assert draw_target(times, 5, 4 / 6, torch.Generator().manual_seed(0)) - 5 == drawn[0]
    further = [draw_target(times, 5, 4 / 6, generator, rate_per_s=1.5) - 5 for _ in range(500)]
    assert np.mean(further) > 1.5 * np.mean(drawn)
    assert draw_target(times, 39, 4 / 6, generator) == 39


@pytest.mark.parametrize("fps", [24.0, 30.0, 25.0, 59.94, 6.0])
def test_clips_have_the_rate_that_was_asked_for(fps):
    """Frames are those nearest to evenly spaced moments, from any start that leaves room for all."""
    times = np.arange(int(4 * fps)) / fps
    starts = set()
    for seed in range(40):
        chosen = clip_frames(times, 6.0, 8, np.random.default_rng(seed))
        starts.add(int(chosen[0]))
        assert np.abs(times[chosen] - times[chosen[0]] - np.arange(8) / 6).max() <= 0.5 / fps + 1e-9
        assert chosen[-1] < len(times)
    assert len(starts) > 5


def test_clips_of_a_variable_rate_follow_the_clock():
    times = np.array([0.0, 0.1, 0.15, 0.4, 0.5, 0.52, 0.75, 1.0])
    assert nearest_frames(times, np.array([0.0, 0.24, 0.3, 0.51, 2.0])).tolist() == [0, 2, 3, 4, 7]
    assert clip_frames(times, 4.0, 5, np.random.default_rng(0)).tolist() == [0, 2, 4, 6, 7]


def test_short_and_slow_videos_give_no_clip():
    assert clip_frames(np.arange(20) / 24, 6.0, 8, np.random.default_rng(0)) is None
    assert clip_frames(np.arange(20) / 3, 6.0, 8, np.random.default_rng(0)) is None


def test_a_batch_is_its_clips_one_by_one():
    """Every clip keeps its own warp, factors and order of operations."""
    clips = torch.rand(5, 3, 3, 20, 28, generator=torch.Generator().manual_seed(0))
    rule = ColourRule(MOTION_COLOURS.brightness, MOTION_COLOURS.contrast, MOTION_COLOURS.saturation, (-0.2, 0.2))
    generators = [torch.Generator().manual_seed(seed) for seed in range(5)]
    maps = torch.stack([draw_warp(MOTION_WARP, 20, 28, g) for g in generators])
    changes = [draw_colours(rule if i else CONTENT_COLOURS, g) for i, g in enumerate(generators)]
    whole = change_colours(warp_clips(clips, maps, (16, 12)), changes)
    for i in range(5):
        alone = change_colours(warp_clips(clips[i : i + 1], maps[i : i + 1], (16, 12)), changes[i : i + 1])
        torch.testing.assert_close(whole[i : i + 1], alone, atol=1e-6, rtol=0)
    assert len({change[0][0] for change in changes}) > 1
    with pytest.raises(ValueError, match="4 colour changes for 5 clips"):
        change_colours(clips, changes[:4])


def test_a_warp_moves_points_as_its_map_says():
    """A bright point of the clip is found where the inverse of the map puts it."""
    clip = torch.zeros(1, 1, 3, 41, 61)
    clip[..., 25, 40] = 1.0
    maps = draw_warp(WarpRule((61, 41), angle=(30.0, 30.0), scale=(1.2, 1.2)), 41, 61, torch.Generator())
    seen = warp_clips(clip, maps[None], (61, 41))[0, 0, 0]
    row, column = divmod(int(seen.argmax()), 61)
    found = maps[:, :2] @ torch.tensor([column - 30.0, row - 20.0]) + maps[:, 2]
    assert (found - torch.tensor([10.0, 5.0])).abs().max() < 0.6
