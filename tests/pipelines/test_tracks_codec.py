"""The tracks sidecar's blob: error bound, clipping, header alone, damage."""

import numpy as np
import pytest

from kinema.pipelines.sidecars.tracks_codec import Tracks, TracksBlob, encode_tracks, scale_for


def make_tracks(num_frames=9, num_tracks=13, height=120, width=200, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    start = rng.uniform(-spread, 1 + spread, (1, num_tracks, 2)) * [width - 1, height - 1]
    points = np.clip(start + rng.normal(0, 3, (num_frames, num_tracks, 2)).cumsum(0), -width * 0.9, width * 1.9)
    queries = np.concatenate([rng.integers(0, num_frames, (num_tracks, 1)), start[0]], axis=1)
    visible = rng.random((num_frames, num_tracks)) < 0.7
    return Tracks(points.astype(np.float32), visible, (height, width), queries.astype(np.float32))


def encode(tracks):
    return encode_tracks(tracks, tracker="chain", weights_hash="none")


@pytest.mark.parametrize("frames", [[7, 2], [3], slice(None)])
def test_positions_of_a_few_frames_are_those_of_all(frames):
    blob = TracksBlob(encode(make_tracks()))
    stored, tracks = blob.stored_tracks(), blob.tracks()
    found = stored.points_px(frames)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, tracks.points_px[frames])
    np.testing.assert_array_equal(stored.visible, tracks.visible)


@pytest.mark.parametrize(
    ("num_frames", "num_tracks", "height", "width"),
    [(9, 13, 120, 200), (1, 1, 1, 1), (97, 3, 480, 864), (5, 0, 33, 47), (24, 256, 1080, 1920), (3, 7, 2160, 3840)],
)
def test_tracks_come_back_within_half_a_step(num_frames, num_tracks, height, width):
    tracks = make_tracks(num_frames, num_tracks, height, width, spread=0.4)
    blob = TracksBlob(encode(tracks))
    header, found = blob.header, blob.tracks()
    assert (header.height, header.width, header.frames, header.tracker) == (height, width, num_frames, "chain")
    assert header.num_saturated == 0 and found.size == (height, width)
    assert found.points_px.dtype == np.float32 and found.points_px.shape == (num_frames, num_tracks, 2)
    assert np.abs(found.points_px - tracks.points_px).max(initial=0) <= 0.5 / header.scale + 1e-4
    np.testing.assert_array_equal(found.visible, tracks.visible)
    np.testing.assert_array_equal(found.queries, tracks.queries)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (100, 341), (342, 20), (480, 864), (1080, 1920), (9000, 16000)])
def test_every_point_up_to_a_side_outside_fits(height, width):
    side = max(height, width)
    corners = np.array([[-side / 2, -side / 2], [side * 1.5, side * 1.5], [width - 1 + side / 2, 0]])
    inside_reach = np.clip(corners, [width / 2 - 1.5 * side, height / 2 - 1.5 * side], None)
    tracks = Tracks(
        np.float32(inside_reach)[:, None], np.ones((3, 1), bool), (height, width), np.zeros((1, 3), np.float32)
    )
    blob = TracksBlob(encode(tracks))
    assert blob.header.num_saturated == 0
    assert blob.header.scale == scale_for(height, width)
    assert np.abs(blob.tracks().points_px - tracks.points_px).max() <= 0.5 / blob.header.scale + 2e-3


def test_points_beyond_reach_are_clipped_and_counted():
    tracks = make_tracks()
    tracks.points_px[2, 4, 0], tracks.points_px[3, 5, 1] = 1e30, -1e4
    blob = TracksBlob(encode(tracks))
    assert blob.header.num_saturated == 2
    found = blob.tracks().points_px
    assert found[2, 4, 0] > 2 * 200 and found[3, 5, 1] < -200
    others = np.ones_like(found, bool)
    others[2, 4, 0] = others[3, 5, 1] = False
    assert np.abs(found - tracks.points_px)[others].max() <= 0.5 / blob.header.scale + 1e-4


def test_equal_tracks_give_equal_bytes_whatever_their_memory_layout():
    tracks = make_tracks()
    strided = Tracks(np.asfortranarray(tracks.points_px), tracks.visible[:, ::1].copy("F"), tracks.size, tracks.queries)
    assert encode(tracks) == encode(strided)


def test_smooth_tracks_are_small():
    """24 frames of 256 tracks: 4 bytes a position before packing."""
    t = np.arange(24)[:, None, None]
    points = np.float32(100 + np.arange(256)[None, :, None] % 16 * 10 + 1.3 * t + np.zeros(2))
    tracks = Tracks(points, np.ones((24, 256), bool), (256, 320), np.zeros((256, 3), np.float32))
    assert len(encode(tracks)) < 24 * 256 * 4 / 4


@pytest.mark.parametrize(("known", "reads_of_index"), [(True, 1), (False, 2)])
def test_header_and_queries_are_read_without_the_tracks(known, reads_of_index):
    tracks = make_tracks(200, 60)
    data = encode(tracks)
    reads = []

    def source(offset, size):
        reads.append(size)
        return data[offset : offset + size]

    blob = TracksBlob(source, **({"size": len(data), "num_tracks": 60} if known else {}))
    np.testing.assert_array_equal(blob.queries, tracks.queries)
    assert (blob.num_tracks, blob.header.frames) == (60, 200)
    assert len(reads) == reads_of_index and sum(reads) < len(data) / 4
    np.testing.assert_array_equal(blob.tracks().visible, tracks.visible)
    assert len(reads) == reads_of_index + 1


def test_every_flipped_byte_is_found():
    data = encode(make_tracks(4, 5))
    for place in range(len(data)):
        bad = data[:place] + bytes([data[place] ^ 0x55]) + data[place + 1 :]
        with pytest.raises(ValueError):
            TracksBlob(bad).tracks()


def test_every_cut_is_found():
    data = encode(make_tracks(4, 5))
    for size in range(len(data)):
        with pytest.raises(ValueError):
            TracksBlob(data[:size]).tracks()
        with pytest.raises(ValueError):
            TracksBlob(lambda offset, count, size=size: data[:size][offset : offset + count]).tracks()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": np.zeros((12, 3), np.float32)}, "tracks disagree"),
        ({"visible": np.zeros((9, 12), bool)}, "tracks disagree"),
        ({"size": (0, 5)}, "empty"),
        ({"points_px": np.full((9, 13, 2), np.nan, np.float32)}, "234 points that are not finite"),
        ({"queries": np.full((13, 3), np.inf, np.float32)}, "39 queries that are not finite"),
    ],
)
def test_what_is_no_track_is_refused(change, message):
    tracks = make_tracks()
    with pytest.raises(ValueError, match=message):
        encode(Tracks(**{**tracks.__dict__, **change}))
