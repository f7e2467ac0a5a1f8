"""Rendered scenes: the drawn pixels agree with the stated motion, occlusion and tracks."""

import av
import cv2
import numpy as np
import pytest

from kinema.pipelines.scenes import Scene, clip_truth, load_scene, render_demo_videos, write_scene


def near_outline(parts: np.ndarray) -> np.ndarray:
    """Pixels within two pixels of another part, where colours are blended."""
    return cv2.morphologyEx(parts.astype(np.float32), cv2.MORPH_GRADIENT, np.ones((5, 5))) > 0


def warped_error(scene: Scene, t0: int, t1: int) -> tuple[np.ndarray, np.ndarray]:
    """Absolute error in grey levels of frame t1 warped to t0 by the flow, and where it should be small."""
    flow = scene.flow_px(t0, t1)
    y, x = np.mgrid[: scene.height, : scene.width].astype(np.float32)
    target_x, target_y = x + flow[0], y + flow[1]
    warped = cv2.remap(scene.frame(t1).astype(np.float32), target_x, target_y, cv2.INTER_CUBIC)
    error = np.abs(warped - scene.frame(t0)).mean(axis=2)
    outline_later = near_outline(scene.part_ids(t1)).astype(np.float32)
    rim = 2.0
    inside = (target_x > rim) & (target_x < scene.width - 1 - rim)
    inside &= (target_y > rim) & (target_y < scene.height - 1 - rim)
    clear = ~near_outline(scene.part_ids(t0)) & (cv2.remap(outline_later, target_x, target_y, 1) == 0)
    return error, clear & inside & ~scene.occluded(t0, t1)


@pytest.mark.parametrize(("seed", "camera"), [(0, "mixed"), (1, "zoom"), (2, "turn"), (3, "pan"), (4, "still")])
@pytest.mark.parametrize(("t0", "t1"), [(0, 1), (5, 3), (2, 11)])
def test_warping_by_the_flow_reproduces_the_frame(seed, camera, t0, t1):
    scene = Scene(seed=seed, height=151, width=203, num_frames=12, camera=camera)
    error, valid = warped_error(scene, t0, t1)
    assert valid.mean() > 0.5
    assert error[valid].mean() < 1.0
    assert np.percentile(error[valid], 99.9) < 8
    # The same measure without motion shows that the bound above means something.
    still = np.abs(scene.frame(t1).astype(np.float32) - scene.frame(t0)).mean(axis=2)
    moving = valid & (np.hypot(*scene.flow_px(t0, t1)) > 2)
    if moving.any():
        assert error[moving].mean() < still[moving].mean() / 5


def test_occluded_pixels_show_something_else():
    scene = Scene(seed=5, height=160, width=200, num_frames=16, num_objects=4)
    flow, hidden = scene.flow_px(0, 15), scene.occluded(0, 15) & ~scene.out_of_frame(0, 15)
    assert 0.005 < hidden.mean() < 0.5
    y, x = np.mgrid[:160, :200].astype(np.float32)
    later = scene.part_ids(15).astype(np.float32)
    found = cv2.remap(later, x + flow[0], y + flow[1], cv2.INTER_NEAREST)
    different = found != scene.part_ids(0)
    assert different[hidden & ~near_outline(scene.part_ids(0))].mean() > 0.95
    seen = ~scene.occluded(0, 15) & ~near_outline(scene.part_ids(0))
    assert different[seen].mean() < 0.05


def test_forward_and_backward_flow_are_inverse_where_nothing_hides():
    scene = Scene(seed=6, height=96, width=128, num_frames=9)
    forward, hidden = scene.flow_px(1, 7), scene.occluded(1, 7)
    points = np.argwhere(~hidden)[::97][:, ::-1].astype(np.float64)
    there = points + forward[:, ~hidden].T[::97]
    back, visible = scene.tracks(there, 7)
    assert visible[1].all()
    np.testing.assert_allclose(back[1], points, atol=1e-4)


def test_tracks_agree_with_flow_and_occlusion():
    scene = Scene(seed=7, height=90, width=120, num_frames=10)
    rng = np.random.default_rng(0)
    pixels = np.stack([rng.integers(0, 120, 200), rng.integers(0, 90, 200)], axis=1)
    xy, visible = scene.tracks(pixels, 4)
    np.testing.assert_allclose(xy[4], pixels, atol=1e-4)
    assert visible[4].all()
    for t in (0, 3, 9):
        flow, hidden = scene.flow_px(4, t), scene.occluded(4, t)
        np.testing.assert_allclose(xy[t] - pixels, flow[:, pixels[:, 1], pixels[:, 0]].T, atol=1e-4)
        np.testing.assert_array_equal(~visible[t], hidden[pixels[:, 1], pixels[:, 0]])


def test_parts_are_rigid():
    scene = Scene(seed=8, height=128, width=128, num_frames=20, camera="pan")
    parts = scene.part_ids(0)
    for part in np.unique(parts):
        where = np.argwhere(parts == part)[:, ::-1]
        if len(where) < 50:
            continue
        xy, _ = scene.tracks(where[[0, len(where) // 2, -1]], 0)
        sides = np.linalg.norm(xy - np.roll(xy, 1, axis=1), axis=2)
        np.testing.assert_allclose(sides, np.broadcast_to(sides[0], sides.shape), rtol=1e-4, atol=1e-3)


def test_same_arguments_same_film_and_another_seed_another():
    first, second, other = (Scene(seed=s, height=64, width=80, num_frames=3) for s in (9, 9, 10))
    np.testing.assert_array_equal(first.frame(2), second.frame(2))
    np.testing.assert_array_equal(first.flow_px(0, 2), second.flow_px(0, 2))
    assert (first.frame(2) != other.frame(2)).mean() > 0.5


def test_cuts_separate_shots():
    scene = Scene(seed=11, height=120, width=160, num_frames=15, cuts=(5, 10))
    assert [scene.shot_of(t) for t in (0, 4, 5, 9, 10, 14)] == [0, 0, 1, 1, 2, 2]
    steps = [np.abs(scene.frame(t + 1).astype(int) - scene.frame(t)).mean() for t in range(14)]
    assert min(steps[4], steps[9]) > 2 * max(s for i, s in enumerate(steps) if i not in (4, 9))
    with pytest.raises(ValueError, match="different shots"):
        scene.flow_px(4, 5)
    xy, visible = scene.tracks(np.array([[80.0, 60.0]]), 6)
    assert np.isnan(xy[:5]).all() and np.isnan(xy[10:]).all() and np.isfinite(xy[5:10]).all()
    assert not visible[:5].any() and visible[6].all()
    numbers = [set(np.unique(scene.part_ids(t))) - {0} for t in (0, 5, 10)]
    assert not (numbers[0] & numbers[1]) and not (numbers[1] & numbers[2])


def test_objects_group_their_parts():
    scene = Scene(seed=12, height=120, width=160, num_frames=2, num_objects=2)
    parts, objects = scene.part_ids(0), scene.object_ids(0)
    assert set(np.unique(objects)) == {0, 1, 2}
    assert len(np.unique(parts)) > 4
    assert all(len(np.unique(objects[parts == part])) == 1 for part in np.unique(parts))


def test_flow_of_a_resized_frame_is_in_its_pixels():
    scene = Scene(seed=13, height=120, width=160, num_frames=4)
    flow, half = scene.flow_px(0, 3), scene.flow_px(0, 3, size=(60, 80))
    pooled = flow.reshape(2, 60, 2, 80, 2).mean((2, 4)) / 2
    inside = ~near_outline(scene.part_ids(0, size=(60, 80)))
    np.testing.assert_allclose(half[:, inside], pooled[:, inside], atol=1e-3)
    assert scene.occluded(0, 3, size=(60, 80)).shape == (60, 80)


def test_speed_sets_the_motion():
    slow, fast = (
        np.hypot(*Scene(seed=14, height=96, width=96, num_frames=2, speed_px=v).flow_px(0, 1)).mean()
        for v in (0.5, 2.0)
    )
    assert 2.5 < fast / slow < 6


def test_still_scene_without_objects_does_not_move():
    scene = Scene(seed=15, height=40, width=50, num_frames=5, num_objects=0, camera="still")
    assert np.abs(scene.flow_px(0, 4)).max() == 0 and not scene.occluded(0, 4).any()


@pytest.mark.parametrize(("height", "width"), [(33, 47), (64, 48)])
def test_a_written_scene_is_found_again(tmp_path, height, width):
    scene = Scene(seed=16, height=height, width=width, num_frames=7, fps=12.5, cuts=(3,), camera="zoom")
    write_scene(scene, tmp_path / "scene.mp4")
    again = load_scene(tmp_path / "scene.mp4")
    np.testing.assert_array_equal(again.flow_px(4, 6), scene.flow_px(4, 6))
    with av.open(str(tmp_path / "scene.mp4")) as container:
        stream = container.streams.video[0]
        frames = [(float(f.pts * stream.time_base), f.to_ndarray(format="rgb24")) for f in container.decode(stream)]
    assert [again.frame_at(time_s) for time_s, _ in frames] == list(range(7))
    for t, (_, decoded) in enumerate(frames):
        assert np.abs(decoded.astype(int) - scene.frame(t)).mean() < 8


def test_a_clip_finds_its_truth_by_the_times_of_its_frames(tmp_path):
    scene = Scene(seed=17, height=48, width=64, num_frames=12, fps=25.0, cuts=(4,))
    write_scene(scene, tmp_path / "a.mp4")
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        pts = sorted(packet.pts for packet in container.demux(stream) if packet.size)
        time_base = [stream.time_base.numerator, stream.time_base.denominator]
    # Every second frame of the second shot, at half the size.
    meta = {"source": "a.mp4", "pts": pts[4::2], "time_base": time_base, "height": 24, "width": 32}
    truth = clip_truth(tmp_path, meta)
    assert truth.frames == (4, 6, 8, 10)
    flow, occluded = truth.motion(2, -1)
    np.testing.assert_array_equal(flow, scene.flow_px(8, 6, size=(24, 32)))
    np.testing.assert_array_equal(occluded, scene.occluded(8, 6, size=(24, 32)))
    assert truth.motion(0, 3, size=(48, 64))[0].shape == (2, 48, 64)


def test_other_videos_are_refused(tmp_path):
    with av.open(str(tmp_path / "plain.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=5)
        stream.width = stream.height = 32
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), "rgb24")))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match="not a rendered scene"):
        load_scene(tmp_path / "plain.mp4")


def test_demo_videos_have_cuts_in_one_of_them_and_are_reproducible(tmp_path):
    first = render_demo_videos(tmp_path / "a", height=48, width=64, num_frames=9)
    second = render_demo_videos(tmp_path / "b", height=48, width=64, num_frames=9)
    assert [len(load_scene(path).cuts) for path in first] == [0, 2, 0]
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 0}, "is empty"),
        ({"num_frames": 5, "cuts": (5,)}, "cuts"),
        ({"num_frames": 5, "cuts": (3, 2)}, "cuts"),
        ({"camera": "dolly"}, "use one of still, pan"),
        ({"num_objects": -1}, "num_objects=-1"),
    ],
)
def test_arguments_that_make_no_scene_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Scene(seed=0, **arguments)
