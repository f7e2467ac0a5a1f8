"""Training samples from a bucket that answers after 30 ms: random mode, stream mode, and plain WebDataset.

The three sides make the same samples of the same bytes in one process with one thread. The plain side reads the tars
of clips and sidecar in sequence with WebDataset's own iterators, zips them by key and takes the clips as they come.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import fsspec
import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from kinema.configs import FlowFeatConfig, FPTConfig, LoaderConfig
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.bench.slow_bucket import slow_bucket
from kinema.pipelines.loader import Clip, ClipIndex, Loader, Skip
from kinema.pipelines.loader.clip import ReadCounter
from kinema.pipelines.loader.reader import stack
from kinema.pipelines.scenes import Scene
from kinema.pipelines.scenes.packed import write_scene_clips, write_scene_flow, write_scene_tracks
from kinema.pipelines.train.recipes.flowfeat import FlowFeatRecipe
from kinema.pipelines.train.recipes.fpt.recipe import FPTRecipe

LATENCY_MS = 30
BATCH = 8


def run(side_px: int = 128, num_frames: int = 10, num_clips: int = 24, per_shard: int = 6) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}; samples/s of stream mode beside the two others."""
    rows = []
    scenes = [Scene(seed, side_px, side_px, num_frames) for seed in range(num_clips)]
    with slow_bucket(LATENCY_MS) as bucket:
        clips = write_scene_clips(scenes, f"{bucket}/clips", clips_per_shard=per_shard)
        flow = write_scene_flow(scenes, clips, f"{bucket}/flow")
        tracks = write_scene_tracks(scenes, clips, f"{bucket}/tracks")
        flowfeat = FlowFeatRecipe(FlowFeatConfig(resize=side_px, crop=side_px // 2, gap=2))
        fpt = FPTRecipe(FPTConfig(gap_s=0.25, image_px=side_px))
        for name, recipe, sidecar in (("FlowFeat", flowfeat, flow), ("FPT", fpt, tracks)):
            flow_url, tracks_url = (flow.url, None) if sidecar is flow else (None, tracks.url)
            index = ClipIndex.open(clips.url, flow_url, tracks_url)
            rates = {mode: _loader_rate(index, recipe, mode, num_clips) for mode in ("random", "stream")}
            rates["plain webdataset"] = _plain_rate(index, clips, sidecar, recipe)
            rows += [
                {
                    "name": f"{name}: stream against {other}",
                    "value": rates["stream"],
                    "baseline": rates[other],
                    "ratio": rates["stream"] / rates[other],
                    "unit": "samples/s",
                }
                for other in ("random", "plain webdataset")
            ]
    return rows


def _loader_rate(index: ClipIndex, recipe: Any, mode: Any, num_clips: int) -> float:
    """Samples/s of one epoch from a cold start: the first shards are waited for."""
    config = LoaderConfig(mode=mode, num_workers=0, shuffle_window=16, lookahead=2)
    loader = Loader(index, recipe.read_sample, config, BATCH, seed=0)
    index._cache.clear()
    started = time.perf_counter()
    batches = iter(loader)
    for _ in range(num_clips // BATCH):
        next(batches)
    seconds = time.perf_counter() - started
    loader.close()
    return num_clips / seconds


def _plain_rate(index: ClipIndex, clips: Artifact, sidecar: Artifact, recipe: Any) -> float:
    rows = {row["key"]: row for row in index.table.to_pylist()}
    keys = list(rows)
    rng, number = np.random.default_rng(0), 0
    started = time.perf_counter()
    samples: list[dict[str, Any]] = []
    for shard in clips.planned_shards():
        urls = clips.shard_url(shard), sidecar.shard_url(shard)
        for clip_sample, sidecar_sample in zip(*(_samples(url) for url in urls), strict=True):
            clip = _ClipInMemory(rows[clip_sample["__key__"]], urls, clip_sample["mp4"], sidecar_sample, sidecar.kind)
            found = recipe.read_sample(clip, rng)
            if not isinstance(found, Skip):
                samples.append(found)
            number += 1
            if len(samples) == BATCH:
                stack(samples, keys[:BATCH])
                samples = []
    return number / (time.perf_counter() - started)


def _samples(url: str) -> Iterator[dict[str, Any]]:
    with fsspec.open(url, "rb") as stream:
        yield from group_by_keys(tar_file_expander([{"stream": stream, "url": url}]))


class _ClipInMemory(Clip):
    """A clip whose mp4 and sidecar blob are at hand."""

    def __init__(self, row: dict[str, Any], urls: tuple[str, str], mp4: bytes, sidecar: dict[str, Any], kind: str):
        flow_url, tracks_url = (urls[1], None) if kind == "flow" else (None, urls[1])
        super().__init__(row, urls[0], flow_url, ReadCounter(), tracks_url)
        self._payloads = {urls[0]: (row["mp4_offset"], mp4), urls[1]: (row[f"{kind}_offset"], sidecar[kind])}

    def _range(self, url: str, offset: int, size: int) -> bytes:
        start, data = self._payloads[url]
        return data[offset - start : offset - start + size]

    def _ranges(self, url: str, start: int, ranges: list[tuple[int, int]]) -> list[tuple[int, bytes]]:
        return [(offset, self._range(url, start + offset, size)) for offset, size in ranges]
