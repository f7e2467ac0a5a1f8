"""`kinema shard layout=rendered`: rendered shots with exact flow as clips, flow/truth and tracks/truth."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import UInt8

from kinema.configs.rendered import RENDERED
from kinema.configs.shard import ShardConfig
from kinema.pipelines import engine
from kinema.pipelines.artifacts import Artifact, sample_key
from kinema.pipelines.artifacts.tables import content_hash
from kinema.pipelines.scenes.rendered import RenderedShot, RenderSettings
from kinema.pipelines.scenes.rendered.configured import render_settings
from kinema.pipelines.scenes.rendered.textures import image_files
from kinema.pipelines.shard.known_flow.shards import PlannedClip, append_plans, build_shards
from kinema.pipelines.shard.known_flow.stage import FlowShardSummary, flow_opener, lossless, summary
from kinema.pipelines.sidecars.flow_codec import FlowPair
from kinema.pipelines.sidecars.sidecar import default_out
from kinema.pipelines.sidecars.tracks_codec import Tracks


@dataclass(frozen=True)
class RenderedClip:
    """One shot; see `shards.PackedClip`."""

    settings: RenderSettings
    seed: int
    index: int

    @property
    def frame_numbers(self) -> tuple[int, ...]:
        """Counted from 0."""
        return tuple(range(self.settings.num_frames))

    @property
    def labels(self) -> dict[str, Any]:
        """How to render it again."""
        pairs = [[t, gap, f"{self.index}/{t}{gap:+d}"] for t, gap in self.pairs()]
        return {"group": RENDERED, "seed": self.seed, "index": self.index, "pairs": pairs}

    def pairs(self) -> list[tuple[int, int]]:
        """Neighbouring frames, both ways."""
        frames = self.settings.num_frames
        return [(t, gap) for t in range(frames) for gap in (-1, 1) if 0 <= t + gap < frames]

    def images(self) -> list[UInt8[np.ndarray, "H W 3"]]:
        """The frames."""
        return list(_shot(self.settings, self.seed, self.index).frames())

    def flows(self) -> Iterator[tuple[FlowPair, int]]:
        """Exact flow and occlusion."""
        shot = _shot(self.settings, self.seed, self.index)
        for t, gap in self.pairs():
            yield FlowPair(t, gap, *shot.motion(t, t + gap)), 0

    def tracks(self, grid: int) -> Tracks:
        """Exact tracks of grid x grid points of the first frame."""
        shot = _shot(self.settings, self.seed, self.index)
        centres = (np.arange(grid) + 0.5) / grid
        x, y = np.meshgrid(centres * shot.width - 0.5, centres * shot.height - 0.5)
        places = np.stack([x.ravel(), y.ravel()], axis=1)
        points, visible = shot.tracks(places, 0)
        queries = np.concatenate([np.zeros((len(places), 1)), places], axis=1).astype(np.float32)
        return Tracks(points, visible, (shot.height, shot.width), queries)


@lru_cache(2)
def _shot(settings: RenderSettings, seed: int, index: int) -> RenderedShot:
    return RenderedShot(settings, seed, index)


def run(config: ShardConfig, *, report: Callable[[str], None] | None = None) -> FlowShardSummary:
    """Render what is missing in `config.out`, its flow and its tracks. Raises: ValueError for settings."""
    started = time.monotonic()
    say = report or (lambda line: print(f"shard: {line}", file=sys.stderr, flush=True))
    clip = lossless(config)
    textures = "" if config.videos in ("", RENDERED) else config.videos
    if textures:
        say(f"textures: {len(image_files(textures))} images of {textures}")
    settings = render_settings(config.rendered, textures)
    if Artifact.is_new(config.out) and engine.backend() == "ray":
        engine.connect()  # an engine that cannot start leaves no folder behind
    content: dict[str, Any] = {"layout": config.layout, "seed": config.rendered.seed, "settings": asdict(settings)}
    content |= {"clip": {"codec": clip.codec, "gop": clip.gop, "preset": clip.preset}, "motion": config.motion}
    clips = Artifact.open(config.out, kind="clips", config=content | {"frames_fps": config.frames_fps})
    planned = [_planned(clips, settings, config.rendered.seed, index) for index in range(config.rendered.count)]
    grid = config.rendered.tracks_grid
    with clips.swept_on_failure():
        flow, new_clips = append_plans(clips, flow_opener(config), planned, config.shard_mb, config.min_shards)
        tracks = _open_tracks(config, clips, flow) if grid else None
        built = build_shards(
            *(clips, flow, planned, clip, Fraction(config.frames_fps).limit_denominator(1001), config.motion),
            num_workers=config.num_workers,
            timeout_s=config.source_timeout_s,
            tracks=tracks,
            tracks_grid=grid,
        )
    for artifact in (clips, flow, tracks):
        if artifact is not None:
            artifact.finalize()
    say(f"flow is in {flow.url}" + (f", tracks in {tracks.url}" if tracks else ""))
    num_pairs = sum(len(RenderedClip(settings, 0, 0).pairs()) for _ in planned)
    num_lost = clips.quarantined().num_rows
    numbers = (num_pairs, num_lost, new_clips, built, round(time.monotonic() - started, 3))
    return summary(clips, flow, numbers, 3 if num_lost / len(planned) > config.allowed_quarantine else 0)


def _planned(clips: Artifact, settings: RenderSettings, seed: int, index: int) -> PlannedClip:
    source = f"{RENDERED}/{seed}/{index:08d}"
    row = {
        "key": sample_key(source, clips.config_hash),
        "source": source,
        "source_hash": content_hash([clips.config_hash, seed, index])[:32],
        "clip": 0,
        "num_frames": settings.num_frames,
        "num_pairs": 2 * (settings.num_frames - 1),
        "expected_bytes": settings.num_frames * settings.height * settings.width * 3 // 2,
    }
    return PlannedClip(row, RenderedClip(settings, seed, index))


def _open_tracks(config: ShardConfig, clips: Artifact, flow: Artifact) -> Artifact:
    out = default_out(config.out, "tracks", "truth")
    settings = {"tracker": "truth", "grid": config.rendered.tracks_grid}
    tracks = Artifact.open(out, kind="tracks", config=settings, inputs={"clips": clips.plan8})
    done = set(tracks.planned_shards())
    rest = flow.plan.filter([shard not in done for shard in flow.plan["shard"].to_pylist()])
    if rest.num_rows:
        tracks.append_plan(rest)
    return tracks
