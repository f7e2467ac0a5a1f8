"""Reading one clip: the right pixels, flow and masks, from only the bytes they need."""

import dataclasses
import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest

from kinema.configs import ClipConfig
from kinema.pipelines.artifacts import Artifact, sample_key
from kinema.pipelines.loader import ClipIndex, DamagedClip
from kinema.pipelines.loader.clip import Clip, ReadCounter
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.orient import Orientation
from kinema.pipelines.video.packets import packet_table
from kinema.pipelines.video.picture import PictureMaker, picture_spec

SCENE = Scene(seed=21, height=64, width=96, num_frames=40, num_objects=2)
CODECS = ("h264", "h264_lossless", "hevc", "av1", "mjpeg", "mpeg4")


@pytest.fixture(scope="module", params=CODECS)
def clip(request, tmp_path_factory) -> Clip:
    url = tmp_path_factory.mktemp("clips") / request.param
    write_scene_clips([SCENE], url, ClipConfig(codec=request.param, preset="veryfast"))
    return fresh(ClipIndex.open(url).clip(0))


@pytest.fixture(scope="module")
def with_flow(tmp_path_factory) -> Clip:
    folder = tmp_path_factory.mktemp("flow")
    clips = write_scene_clips([SCENE], folder / "clips", ClipConfig(preset="veryfast"))
    write_scene_flow([SCENE], clips, folder / "flow", gaps=(1, -1), size=(32, 48))
    return ClipIndex.open(clips.url, folder / "flow").clip(0)


def fresh(clip: Clip, **changes) -> Clip:
    """The same clip with nothing parsed and nothing counted."""
    return Clip({**clip.row, **changes}, clip._shard_url, clip._flow_shard_url, ReadCounter())


def all_frames(mp4: bytes) -> np.ndarray:
    """Every frame, by decoding the whole file through its container."""
    with av.open(io.BytesIO(mp4)) as container:
        container.streams.video[0].thread_count = 1
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def stored_mp4(clip: Clip) -> bytes:
    start = clip.row["mp4_offset"]
    return Path(clip._shard_url).read_bytes()[start : start + clip.row["mp4_size"]]


@pytest.mark.parametrize(
    "indices",
    [[0], [39], [11, 12], [17], [5, 3, 5, 0], list(range(40)), [38, 1], [12, 24, 36], [23]],
)
def test_frames_equal_decoding_the_whole_clip(clip, indices):
    found = clip.frames(indices)
    np.testing.assert_array_equal(found, all_frames(stored_mp4(clip))[indices])


def test_pictures_are_the_frames_by_index(clip):
    found = fresh(clip).pictures([30, 2, 30])
    assert set(found) == {2, 30}
    np.testing.assert_array_equal(np.stack([found[2], found[30]]), clip.frames([2, 30]))
    assert fresh(clip).pictures([]) == {}
    with pytest.raises(ValueError, match=f"frames 0..{clip.num_frames - 1}, not {clip.num_frames}"):
        clip.pictures([0, clip.num_frames])


def test_lossless_frames_are_the_scenes(tmp_path):
    write_scene_clips([SCENE], tmp_path, ClipConfig(codec="h264_lossless", preset="ultrafast"))
    frames = ClipIndex.open(tmp_path).clip(0).frames([0, 20])
    np.testing.assert_array_equal(frames, np.stack([SCENE.frame(0), SCENE.frame(20)]))


def test_random_frames_equal_decoding_the_whole_clip(clip):
    everything = all_frames(stored_mp4(clip))
    rng = np.random.default_rng(0)
    for _ in range(10):
        indices = rng.integers(0, 40, rng.integers(1, 5)).tolist()
        np.testing.assert_array_equal(fresh(clip).frames(indices), everything[indices])


def test_one_frame_costs_at_most_its_group_of_pictures(clip):
    for index in range(clip.num_frames):
        reader = fresh(clip)
        reader.frames([index])
        assert reader._counter.frames_decoded <= 12
        assert reader._counter.bytes_read < 0.5 * clip.row["mp4_size"]
    first = fresh(clip)
    first.frames([24])
    assert first._counter.frames_decoded == 1


def test_clip_without_packet_table_gives_the_same_frames(clip):
    table = ("extradata", "packet_offset", "packet_size", "packet_frame", "packet_keyframe")
    for nothing in (None, []):
        reader = fresh(clip, **dict.fromkeys(table, nothing))
        np.testing.assert_array_equal(reader.frames([30, 2]), clip.frames([30, 2]))
        reader.frames([7])
        assert reader._counter.bytes_read == clip.row["mp4_size"]


def test_no_frames_and_frames_that_are_not_there(clip):
    assert clip.frames([]).shape == (0, 64, 96, 3)
    for index in (-1, 40):
        with pytest.raises(ValueError, match=rf"frames 0..39, not {index}") as caught:
            clip.frames([index])
        assert not isinstance(caught.value, DamagedClip)


def test_meta_is_the_samples_json(clip):
    assert clip.meta["key"] == clip.key and clip.meta["num_frames"] == 40
    assert (clip.height, clip.width, clip.fps) == (64, 96, 24.0)


def test_flow_and_occlusion_are_those_of_the_scene(with_flow):
    assert with_flow.flow_size == (32, 48)
    assert len(with_flow.flow_pairs) == 2 * 39
    for t, gap in [(0, 1), (20, -1), (38, 1)]:
        exact, occluded = SCENE.motion(t, t + gap, (32, 48))
        assert np.abs(with_flow.flow(t, gap) - exact).max() <= 1 / 128
        np.testing.assert_array_equal(with_flow.occlusion(t, gap), occluded)
        pair = with_flow.flow_pair(t, gap)
        np.testing.assert_array_equal(pair.flow_px, with_flow.flow(t, gap))
        np.testing.assert_array_equal(pair.occlusion, occluded)


def test_one_flow_pair_costs_little_more_than_its_bytes(with_flow):
    reader = fresh(with_flow)
    reader.flow(9, 1)
    assert reader._counter.bytes_read < 0.2 * reader.row["flow_size"]


def test_a_pair_that_is_not_stored_is_the_callers_mistake(with_flow):
    with pytest.raises(KeyError, match="t=0 gap=5"):
        with_flow.flow(0, 5)


def test_clip_without_flow_says_so(clip):
    assert clip.flow_pairs == []
    for read in (clip.flow, clip.occlusion, clip.flow_pair):
        with pytest.raises(ValueError, match="opened without flow") as caught:
            read(0, 1)
        assert not isinstance(caught.value, DamagedClip)


def test_masks_come_along(tmp_path):
    masks = np.random.default_rng(0).integers(0, 3, (40, 64, 96), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez_compressed(buffer, masks=masks)
    clip = write_clip(tmp_path, [SCENE.frame(t) for t in range(3)], {"masks.npz": buffer.getvalue()})
    np.testing.assert_array_equal(clip.masks(), masks)
    assert fresh(clip, masks_size=0, masks_offset=0).masks() is None


@pytest.mark.parametrize("place", [0.1, 0.5])
def test_damaged_mp4_is_named(clip, tmp_path, place):
    data = bytearray(Path(clip._shard_url).read_bytes())
    start, size = clip.row["mp4_offset"], clip.row["mp4_size"]
    data[start : start + size] = np.random.default_rng(0).bytes(size)
    (tmp_path / "damaged.tar").write_bytes(data)
    damaged = Clip(clip.row, str(tmp_path / "damaged.tar"), None, ReadCounter())
    with pytest.raises(DamagedClip, match=rf"{clip.key}\.mp4: "):
        damaged.frames([int(place * 40)])


def test_missing_shard_is_named(with_flow, tmp_path):
    gone = Clip(with_flow.row, str(tmp_path / "gone.tar"), str(tmp_path / "gone_too.tar"), ReadCounter())
    with pytest.raises(DamagedClip, match=r"\.mp4: .*gone\.tar does not exist"):
        gone.frames([0])
    with pytest.raises(DamagedClip, match=r"\.flow: .*gone_too\.tar does not exist"):
        gone.flow(0, 1)
    with pytest.raises(DamagedClip, match=r"\.json: "):
        _ = gone.meta


def write_clip(folder: Path, frames: list[np.ndarray], extra: dict[str, bytes], codec: str = "h264") -> Clip:
    """An artifact of one clip with these frames."""
    config = ClipConfig(codec=codec, preset="veryfast")
    first = av.VideoFrame.from_ndarray(frames[0], format="rgb24")
    spec = picture_spec(first, Orientation(), codec, 0)
    maker = PictureMaker(spec)
    with ClipEncoder(config, spec, Fraction(24)) as encoder:
        for frame in frames:
            encoder.add(maker.make(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        mp4 = encoder.finish()
    table = packet_table(mp4)
    artifact = Artifact.open(folder, kind="clips", config=dataclasses.asdict(config))
    key = sample_key("one")
    artifact.append_plan(pa.table({"shard": pa.array([0], pa.int32()), "key": [key], "source": ["x"]}))
    row = {"num_frames": len(frames), "height": spec.height, "width": spec.width, "fps_num": 24, "fps_den": 1}
    row |= {"codec": codec, "extradata": table.extradata, "packet_offset": table.offset}
    row |= {"packet_size": table.size, "packet_frame": table.frame, "packet_keyframe": table.keyframe}
    with artifact.shard_writer(0) as writer:
        writer.add(key, {"json": b"{}", "mp4": mp4, **extra}, row)
        writer.commit()
    artifact.finalize()
    return ClipIndex.open(folder).clip(0)


@pytest.mark.parametrize("name", ["mdn_flower.mp4", "mdn_tears_of_steel.webm", "torchcodec_nasa_13013.mp4"])
def test_real_footage_equals_decoding_the_whole_clip(shared_data, tmp_path, name):
    frames = []
    with av.open(str(shared_data / "videos" / name)) as container:
        for frame in container.decode(video=0):
            frames.append(frame.to_ndarray(format="rgb24"))
            if len(frames) == 30:
                break
    clip = write_clip(tmp_path, frames, {})
    everything = all_frames(stored_mp4(clip))
    rng = np.random.default_rng(1)
    for _ in range(4):
        indices = rng.integers(0, 30, 2).tolist()
        np.testing.assert_array_equal(fresh(clip).frames(indices), everything[indices])
    assert np.abs(clip.frames([15])[0][: frames[0].shape[0], : frames[0].shape[1]] - frames[15].astype(int)).mean() < 6
