"""Rendered scenes packed as the artifacts that `shard`, `teach` and `track` make: clips, their exact flow and tracks.

For tests, benchmarks and models that learn from perfect motion; no video file, cut detector or teacher takes part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa

from kinema.configs import ClipConfig
from kinema.pipelines.artifacts import Artifact, content_hash, sample_key
from kinema.pipelines.artifacts.tables import canonical_json
from kinema.pipelines.scenes.motion_classes import MotionClip
from kinema.pipelines.scenes.scene import Scene
from kinema.pipelines.sidecars.flow_codec import FlowBlob, FlowPair, encode_clip_flow
from kinema.pipelines.sidecars.tracks_codec import Tracks, TracksBlob, encode_tracks
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.orient import Orientation
from kinema.pipelines.video.packets import packet_table
from kinema.pipelines.video.picture import PictureMaker, picture_spec


def write_scene_clips(
    scenes: Sequence[Scene | MotionClip], url: str | Path, clip: ClipConfig | None = None, clips_per_shard: int = 4
) -> Artifact:
    """One clip for every shot of every scene, as a clips artifact.

    Raises: ValueError for a scene with an odd side, which an encoder would pad.
    """
    clip = clip or ClipConfig()
    shots = [(scene, start, stop) for scene in scenes for start, stop in _shots(scene)]
    for scene, _, _ in shots:
        if scene.height % 2 or scene.width % 2:
            raise ValueError(f"scene of {scene.height}x{scene.width}: packed scenes need even sides")
    artifact = Artifact.open(url, kind="clips", config=clip.content())
    keys = [sample_key(str(scene.seed), _identity(scene), start, stop, content_hash(clip.content()))
            for scene, start, stop in shots]  # fmt: skip
    plan: list[dict[str, Any]] = [
        {"shard": number // clips_per_shard, "key": key, "source": f"scene-{shot[0].seed}"}
        for number, (key, shot) in enumerate(zip(keys, shots, strict=True))
    ]
    artifact.append_plan(_plan_table(plan))
    for shard in artifact.pending():
        with artifact.shard_writer(shard) as writer:
            for row, (scene, start, stop) in zip(plan, shots, strict=True):
                if row["shard"] == shard:
                    members, columns = _clip_sample(scene, start, stop, clip, row)
                    writer.add(row["key"], members, columns)
            writer.commit()
    artifact.finalize()
    return artifact


def write_scene_flow(
    scenes: Sequence[Scene],
    clips: Artifact,
    url: str | Path,
    gaps: Sequence[int] = (1, -1, 2, -2),
    size: tuple[int, int] | None = None,
) -> Artifact:
    """Exact flow and occlusion of the clips that `write_scene_clips` made from the same scenes.

    Args: gaps, signed; size, (height, width) of the stored flow, the scene's own by default.
    """
    rows = clips.samples(["key", "shard", "source", "num_frames"]).to_pylist()
    shots = [(scene, start, stop) for scene in scenes for start, stop in _shots(scene)]
    config = {"teacher": "exact", "gaps": list(gaps), "size": list(size or ())}
    artifact = Artifact.open(url, kind="flow", config=config, inputs={"clips": clips.plan8})
    artifact.append_plan(_plan_table(rows))
    for shard in artifact.pending():
        with artifact.shard_writer(shard) as writer:
            for row, (scene, start, stop) in zip(rows, shots, strict=True):
                if row["shard"] != shard:
                    continue
                height, width = size or (scene.height, scene.width)
                blob = encode_clip_flow(
                    _exact_pairs(scene, start, stop, gaps, size),
                    height=height, width=width, teacher="exact", weights_hash="none", frames=stop - start,
                )  # fmt: skip
                columns = {"height": height, "width": width, "teacher": "exact", "weights_hash": "none"}
                columns |= {"num_pairs": len(FlowBlob(blob).pairs), "num_saturated": FlowBlob(blob).num_saturated}
                writer.add(row["key"], {"flow": blob}, columns)
            writer.commit()
    artifact.finalize()
    return artifact


def write_scene_tracks(
    scenes: Sequence[Scene],
    clips: Artifact,
    url: str | Path,
    grid: int = 16,
    start_frames: Sequence[int] = (0,),
) -> Artifact:
    """Exact tracks of the clips that `write_scene_clips` made from the same scenes.

    Args: grid, surface points are chosen on grid x grid places of a frame, at the middles of its cells;
        start_frames, of each clip, in which that is done; negative ones count from its end.
    """
    rows = clips.samples(["key", "shard", "source", "num_frames"]).to_pylist()
    shots = [(scene, start, stop) for scene in scenes for start, stop in _shots(scene)]
    config = {"tracker": "exact", "grid": grid, "start_frames": list(start_frames)}
    artifact = Artifact.open(url, kind="tracks", config=config, inputs={"clips": clips.plan8})
    artifact.append_plan(_plan_table(rows))
    for shard in artifact.pending():
        with artifact.shard_writer(shard) as writer:
            for row, (scene, start, stop) in zip(rows, shots, strict=True):
                if row["shard"] != shard:
                    continue
                tracks = _exact_tracks(scene, start, stop, grid, start_frames)
                blob = encode_tracks(tracks, tracker="exact", weights_hash="none")
                columns = {"height": scene.height, "width": scene.width, "tracker": "exact", "weights_hash": "none"}
                columns |= {"num_tracks": len(tracks.queries), "num_saturated": TracksBlob(blob).header.num_saturated}
                writer.add(row["key"], {"tracks": blob}, columns)
            writer.commit()
    artifact.finalize()
    return artifact


def _exact_tracks(scene: Scene, start: int, stop: int, grid: int, start_frames: Sequence[int]) -> Tracks:
    """Tracks of the frames start..stop - 1, which are one shot."""
    centres = (np.arange(grid) + 0.5) / grid
    x, y = np.meshgrid(centres * scene.width - 0.5, centres * scene.height - 0.5)
    places = np.stack([x.ravel(), y.ravel()], axis=1)
    points, visible, queries = [], [], []
    for frame in start_frames:
        t = range(stop - start)[frame]
        xy, seen = scene.tracks(places, start + t)
        points.append(xy[start:stop])
        visible.append(seen[start:stop])
        queries.append(np.concatenate([np.full((len(places), 1), t), places], axis=1).astype(np.float32))
    size = (scene.height, scene.width)
    return Tracks(np.concatenate(points, axis=1), np.concatenate(visible, axis=1), size, np.concatenate(queries))


def _shots(scene: Scene | MotionClip) -> list[tuple[int, int]]:
    starts = [0, *scene.cuts]
    return list(zip(starts, [*scene.cuts, scene.num_frames], strict=True))


def _plan_table(rows: list[dict[str, Any]]) -> pa.Table:
    schema = pa.schema([("shard", pa.int32()), ("key", pa.string()), ("source", pa.string())])
    return pa.Table.from_pylist([{name: row[name] for name in schema.names} for row in rows], schema=schema)


def _identity(scene: Scene | MotionClip) -> str:
    return canonical_json({n: v for n, v in vars(scene).items() if not n.startswith("_")}).decode()


def _clip_sample(
    scene: Scene | MotionClip, start: int, stop: int, clip: ClipConfig, row: dict[str, Any]
) -> tuple[dict[str, bytes], dict[str, Any]]:
    fps = Fraction(scene.fps).limit_denominator(1001)
    mp4 = _encode(scene, start, stop, clip, fps)
    table = packet_table(mp4)
    common = {
        "source": row["source"],
        "start_s": float(start / fps),
        "end_s": float(stop / fps),
        "num_frames": stop - start,
        "width": scene.width,
        "height": scene.height,
        "rotation": 0,
        "codec": clip.codec,
        "motion_score": scene.speed_px / min(scene.height, scene.width),
        "duplicate_of": None,
    }
    labels = scene.labels if isinstance(scene, MotionClip) else {}
    meta = common | {
        "labels": labels,
        "key": row["key"],
        "pts": list(range(start, stop)),
        "time_base": [fps.denominator, fps.numerator],
        "fps": [fps.numerator, fps.denominator],
    }
    columns = common | {
        "fps_num": fps.numerator,
        "fps_den": fps.denominator,
        "duplicate_of": None,
        "labels": canonical_json(labels).decode() if labels else None,
        "extradata": table.extradata,
        "packet_offset": table.offset,
        "packet_size": table.size,
        "packet_frame": table.frame,
        "packet_keyframe": table.keyframe,
    }
    return {"json": canonical_json(meta), "mp4": mp4}, columns


def _encode(scene: Scene | MotionClip, start: int, stop: int, clip: ClipConfig, fps: Fraction) -> bytes:
    frames = (av.VideoFrame.from_ndarray(scene.frame(t), format="rgb24") for t in range(start, stop))
    first = next(frames)
    spec = picture_spec(first, Orientation(), clip.codec, 0)
    maker = PictureMaker(spec)
    with ClipEncoder(clip, spec, fps) as encoder:
        encoder.add(maker.make(first))
        for frame in frames:
            encoder.add(maker.make(frame))
        return encoder.finish()


def _exact_pairs(
    scene: Scene, start: int, stop: int, gaps: Sequence[int], size: tuple[int, int] | None
) -> Iterator[FlowPair]:
    for t in range(stop - start):
        for gap in gaps:
            if 0 <= t + gap < stop - start:
                yield FlowPair(t, gap, *scene.motion(start + t, start + t + gap, size))
