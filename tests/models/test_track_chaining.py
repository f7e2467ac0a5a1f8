"""Chained flow: exact tracks from exact flow, occlusion and re-detection on rendered scenes with known motion."""

from functools import lru_cache

import numpy as np
import pytest

from kinema.models.tracks.chaining import chain_tracks, grid_queries
from kinema.pipelines.scenes import Scene

HEIGHT, WIDTH, NUM_FRAMES = 112, 144, 24


def pairs_of(num_frames, gaps):
    return [(t, s * g) for t in range(num_frames) for g in gaps for s in (1, -1) if 0 <= t + s * g < num_frames]


def chain_scene(scene, gaps, queries, read_flow=None):
    pairs = pairs_of(scene.num_frames, gaps)
    read = read_flow or lru_cache(lambda t, gap: scene.flow_px(t, t + gap))
    return chain_tracks(read, pairs, scene.num_frames, queries, scene.height, scene.width)


def truth_of(scene, queries):
    points = np.empty((scene.num_frames, len(queries), 2), np.float32)
    visible = np.empty((scene.num_frames, len(queries)), bool)
    for t in np.unique(queries[:, 0]).astype(int):
        mine = queries[:, 0] == t
        points[:, mine], visible[:, mine] = scene.tracks(queries[mine, 1:].astype(np.float64), t)
    return points, visible


def scores(scene, found, queries):
    """Share of truly visible points within 1 px, and share of right visibility flags."""
    points, visible = truth_of(scene, queries)
    error_px = np.linalg.norm(found.points_px - points, axis=2)
    return (error_px < 1)[visible].mean(), (found.visible == visible).mean(), visible.mean()


@pytest.mark.parametrize(
    ("seed", "gaps", "camera"),
    [(900, (1,), "pan"), (901, (1, 2), "mixed"), (902, (1, 2), "zoom"), (903, (1, 2), "turn"), (904, (1, 4), "still")],
)
def test_tracks_on_rendered_scenes_stay_within_a_pixel(seed, gaps, camera):
    scene = Scene(seed, HEIGHT, WIDTH, NUM_FRAMES, num_objects=3 + seed % 3, camera=camera)
    queries = grid_queries(12, HEIGHT, WIDTH, [0, 11])
    within, occlusion_accuracy, visible_share = scores(scene, chain_scene(scene, gaps, queries), queries)
    assert visible_share < 0.97  # there is something to hide
    assert within > 0.95
    assert occlusion_accuracy > 0.95


def test_fast_motion():
    """Three times the usual speed: limbs turn by a quarter of a radian a frame and hide behind one another."""
    scene = Scene(905, HEIGHT, WIDTH, NUM_FRAMES, num_objects=4, speed_px=2.5)
    queries = grid_queries(12, HEIGHT, WIDTH, [0])
    within, occlusion_accuracy, _ = scores(scene, chain_scene(scene, (1, 2), queries), queries)
    assert within > 0.9
    assert occlusion_accuracy > 0.9


def test_noisy_flow_still_gives_tracks_and_longer_gaps_make_them_better():
    """0.15 px of noise in every vector: chaining 24 of them drifts, longer gaps drift less."""
    scene = Scene(908, HEIGHT, WIDTH, NUM_FRAMES)
    queries = grid_queries(10, HEIGHT, WIDTH, [0])
    points, visible = truth_of(scene, queries)

    @lru_cache
    def read_flow(t, gap):
        rng = np.random.default_rng([t, gap + 100])
        noise = rng.normal(0, 0.15, (2, HEIGHT, WIDTH))
        return (scene.flow_px(t, t + gap) + noise).astype(np.float32)

    errors_px = []
    for gaps in ((1,), (1, 2, 4, 8)):
        found = chain_scene(scene, gaps, queries, read_flow)
        assert (found.visible == visible).mean() > 0.92
        errors_px.append(np.linalg.norm(found.points_px - points, axis=2)[visible].mean())
    assert errors_px[1] < 0.7 * errors_px[0]


class Curtain:
    """A background that drifts by (1, 0.5) px a frame and a bar of 12 px that sweeps over it at 5 px a frame."""

    height, width, num_frames = 48, 96, 20
    ground, bar = np.array([1.0, 0.5]), np.array([5.0, 0.0])

    def over(self, x, t):
        return (x >= 5.0 * t - 12) & (x < 5.0 * t)

    def flow_px(self, t, gap):
        x = np.broadcast_to(np.arange(self.width), (self.height, self.width))
        flow = np.where(self.over(x, t), self.bar[:, None, None], self.ground[:, None, None]) * gap
        return flow.astype(np.float32)


@pytest.mark.parametrize("gaps", [(1,), (1, 2), (1, 2, 4)])
def test_a_point_behind_a_curtain_is_hidden_and_found_again(gaps):
    scene = Curtain()
    queries = np.array([[0, 30.0, 20.0], [0, 30.25, 20.5], [19, 60.0, 30.0]], np.float32)
    found = chain_tracks(scene.flow_px, pairs_of(20, gaps), 20, queries, scene.height, scene.width)
    for track, (start, x, y) in enumerate(queries):
        t = np.arange(20)
        expected = np.stack([x + (t - start) * 1.0, y + (t - start) * 0.5], axis=1)
        covered = scene.over(expected[:, 0], t)
        assert 2 <= covered.sum() <= 4
        np.testing.assert_allclose(found.points_px[:, track], expected, atol=0.05)
        near_the_rim = scene.over(expected[:, 0] - 1, t) != scene.over(expected[:, 0] + 1, t)
        assert (found.visible[:, track] == ~covered)[~near_the_rim].all()


def test_a_long_gap_bridges_an_occlusion_that_nothing_else_tells_of():
    """Behind a cover as large as the picture there is no surface to follow: only flow over the gap knows."""
    covered = range(5, 8)

    def flow_px(t, gap):
        # Seen ground moves in jumps; the cover stands still.
        hidden = t in covered or t + gap in covered
        x = np.array([0, 1, 3, 4, 7, 0, 0, 0, 9, 10, 12], np.float32)
        flow = np.zeros((2, 40, 60), np.float32)
        flow[0] = 500.0 * np.sign(gap) if hidden and (t in covered) != (t + gap in covered) else 0 if hidden else (
            x[t + gap] - x[t]
        )  # fmt: skip
        return flow

    queries = np.array([[0, 20.0, 20.0]], np.float32)
    found = chain_tracks(flow_px, pairs_of(11, (1, 4)), 11, queries, 40, 60)
    assert found.visible[:, 0].tolist() == [t not in covered for t in range(11)]
    np.testing.assert_allclose(found.points_px[8:, 0], [[29, 20], [30, 20], [32, 20]], atol=1e-4)


def test_a_point_that_leaves_the_picture_comes_back():
    """A camera that swings: points leave at the right and return; nothing outside can be seen."""
    shift = 14 * np.sin(np.arange(24) / 23 * np.pi)

    def flow_px(t, gap):
        return np.stack([np.full((40, 60), shift[t + gap] - shift[t]), np.zeros((40, 60))]).astype(np.float32)

    queries = np.array([[0, 50.0, 20.0], [0, 20.0, 5.0]], np.float32)
    found = chain_tracks(flow_px, pairs_of(24, (1, 2)), 24, queries, 40, 60)
    expected_x = queries[:, 1] + shift[:, None]
    np.testing.assert_allclose(found.points_px[..., 0], expected_x, atol=0.05)
    assert np.array_equal(found.visible, expected_x < 59.5)


def test_points_beside_a_motion_edge_keep_to_their_side():
    """Two halves slide past each other along a vertical edge; interpolation across it would drag points along."""

    def flow_px(t, gap):
        flow = np.zeros((2, 120, 40), np.float32)
        flow[1, :, 20:] = 3.0 * gap
        return flow

    x = np.array([18.0, 18.75, 19.0, 19.25, 19.75, 20.0, 20.5, 21.0])
    queries = np.stack([np.zeros(8), x, np.full(8, 30.25)], axis=1)
    found = chain_tracks(flow_px, pairs_of(16, (1, 2)), 16, queries, 120, 40)
    expected_y = 30.25 + np.where(x > 19.5, 3.0, 0.0) * np.arange(16)[:, None]
    np.testing.assert_allclose(found.points_px[..., 1], expected_y, atol=1e-3)
    np.testing.assert_allclose(found.points_px[..., 0], np.broadcast_to(x, (16, 8)), atol=1e-3)
    assert found.visible.all()


def test_backwards_in_time_is_forwards_in_the_reversed_clip():
    scene = Scene(909, 64, 80, 10)
    last = scene.num_frames - 1
    queries = grid_queries(8, 64, 80, [0])
    reversed_queries = queries.copy()
    reversed_queries[:, 0] = last
    forward = chain_scene(scene, (1, 2), queries)
    pairs = pairs_of(10, (1, 2))
    backward = chain_tracks(lambda t, gap: scene.flow_px(last - t, last - t - gap), pairs, 10, reversed_queries, 64, 80)
    np.testing.assert_array_equal(forward.points_px, backward.points_px[::-1])
    np.testing.assert_array_equal(forward.visible, backward.visible[::-1])


def test_every_pair_is_read_at_most_once_in_each_direction_of_time():
    scene = Scene(910, 48, 64, 9)
    asked = []

    def read_flow(t, gap):
        asked.append((t, gap))
        return scene.flow_px(t, t + gap)

    chain_scene(scene, (1, 2, 3), grid_queries(4, 48, 64, [0, 4, 8]), read_flow)
    assert max(asked.count(pair) for pair in set(asked)) <= 2


def test_tracks_do_not_depend_on_their_company():
    scene = Scene(911, 64, 80, 8)
    queries = grid_queries(6, 64, 80, [0, 5])
    together = chain_scene(scene, (1, 2), queries)
    alone = chain_scene(scene, (1, 2), queries[7:8])
    np.testing.assert_allclose(alone.points_px[:, 0], together.points_px[:, 7], atol=1e-4)
    np.testing.assert_array_equal(alone.visible[:, 0], together.visible[:, 7])


@pytest.mark.parametrize(("height", "width", "num_frames"), [(1, 1, 3), (2, 7, 2), (9, 3, 4), (5, 5, 1)])
def test_tiny_clips(height, width, num_frames):
    queries = grid_queries(2, height, width, [0, num_frames - 1])
    still = np.zeros((2, height, width), np.float32)
    found = chain_tracks(lambda t, gap: still, pairs_of(num_frames, (1,)), num_frames, queries, height, width)
    np.testing.assert_allclose(found.points_px, np.broadcast_to(queries[:, 1:], found.points_px.shape))
    assert found.visible.all() and found.visible.shape == (num_frames, 8)


def test_no_queries_give_no_tracks():
    still = np.zeros((2, 8, 8), np.float32)
    found = chain_tracks(lambda t, gap: still, pairs_of(3, (1,)), 3, np.zeros((0, 3)), 8, 8)
    assert found.points_px.shape == (3, 0, 2) and found.visible.shape == (3, 0)


def test_grid_points_are_the_centres_of_equal_cells():
    queries = grid_queries(2, 40, 60, [3, 7])
    assert queries.tolist() == [
        [t, x, y] for t in (3, 7) for y in (9.5, 29.5) for x in (14.5, 44.5)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ((0, -1, 3), "outside of 4 frames of 10x8"),
        ((0, 3, 8), "outside of"),
        ((4, 3, 3), "outside of"),
        ((0, np.nan, 3), "outside of"),
    ],
)
def test_queries_outside_are_refused(query, message):
    still = np.zeros((2, 8, 10), np.float32)
    with pytest.raises(ValueError, match=message):
        chain_tracks(lambda t, gap: still, pairs_of(4, (1,)), 4, np.array([query]), 8, 10)


def test_flow_without_every_step_is_refused():
    still = np.zeros((2, 8, 10), np.float32)
    pairs = [pair for pair in pairs_of(4, (1, 2)) if pair != (2, -1)]
    with pytest.raises(ValueError, match=r"no flow from frame 2 to 1: chaining needs gap 1 forward and backward"):
        chain_tracks(lambda t, gap: still, pairs, 4, np.array([[0, 1, 1]]), 8, 10)
