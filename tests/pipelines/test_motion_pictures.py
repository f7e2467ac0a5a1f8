"""Pictures of motion show what happened, at the right place."""

import av
import numpy as np
import pytest
import torch

from kinema.pipelines.pictures.images import flow_picture
from kinema.pipelines.pictures.motion import (
    arrows_picture,
    track_trails,
    warped_difference,
    wheel_picture,
    write_mp4,
)
from kinema.pipelines.scenes import Scene


def test_the_wheel_is_the_legend_of_flow_pictures():
    wheel = wheel_picture(101)
    right = flow_picture(torch.tensor([1.0, 0.0]).view(2, 1, 1), max_px=1.0)[0, 0]
    np.testing.assert_array_equal(wheel[50, 100], right)
    np.testing.assert_array_equal(wheel[50, 50], [255, 255, 255])
    np.testing.assert_array_equal(wheel[0, 0], [255, 255, 255])


def test_arrows_reach_from_a_pixel_to_its_target():
    flow = np.zeros((2, 64, 96), np.float32)
    flow[0], flow[:, 40:] = 12.0, np.nan
    picture = arrows_picture(np.zeros((64, 96, 3), np.uint8), flow, step_px=32)
    drawn = (picture != 40).any(axis=2)
    assert drawn[16, 16:28].all() and not drawn[10, :].any()
    assert not drawn[44:].any(), "unknown flow has no arrow"


def test_arrows_of_absurd_flow_do_not_wrap_around():
    flow = np.full((2, 40, 40), 1e8, np.float32)
    picture = arrows_picture(np.zeros((40, 40, 3), np.uint8), flow, step_px=20)
    assert not (picture[:9, :9] != 40).any()


def test_warped_difference_is_grey_where_the_flow_is_right():
    scene = Scene(seed=3, height=96, width=128, num_frames=3)
    flow, hidden = scene.motion(0, 1)
    right = warped_difference(scene.frame(0), scene.frame(1), flow, hidden)
    wrong = warped_difference(scene.frame(0), scene.frame(1), np.zeros_like(flow), hidden)
    seen = ~hidden & (right.max(axis=2) > 0)
    error = [np.abs(picture[seen].astype(int) - 128).mean() for picture in (right, wrong)]
    assert error[0] < 0.4 * error[1]
    blue = right[hidden & (right.max(axis=2) > 0)]
    assert len(blue) == 0 or (blue[:, 2] >= 120).all()


def test_trails_follow_visible_points_only():
    frames = [np.zeros((48, 64, 3), np.uint8)] * 6
    points = np.stack([np.array([[10.0 + 8 * t, 12.0], [10.0 + 8 * t, 36.0]]) for t in range(6)])
    visible = np.ones((6, 2), bool)
    visible[2:, 1] = False
    last = list(track_trails(frames, points, visible))[-1]
    assert last[12, 10:50].any(axis=1).all(), "the way of the visible point is drawn"
    assert not last[36, 30:44].any(), "the way of the hidden point is not"
    assert last[36, 48:53].any() and not last[36, 50].any(), "a hidden point is hollow"


def test_a_film_holds_all_frames_at_odd_sizes(tmp_path):
    frames = [np.full((31, 45, 3), 40 * t, np.uint8) for t in range(5)]
    write_mp4(tmp_path / "a" / "film.mp4", frames, fps=29.97)
    with av.open(str(tmp_path / "a" / "film.mp4")) as container:
        stream = container.streams.video[0]
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert float(stream.average_rate) == pytest.approx(29.97, rel=1e-3)
    assert len(decoded) == 5 and decoded[0].shape == (32, 46, 3)
    np.testing.assert_allclose([d.mean() for d in decoded], [40 * t for t in range(5)], atol=3)
    with pytest.raises(ValueError, match="at least one frame"):
        write_mp4(tmp_path / "b.mp4", [], fps=24)
    assert {p.name for p in tmp_path.iterdir()} == {"a"}
