"""Our shards for people who read them with WebDataset: frames, flow and tracks of a clip joined by key.

    import webdataset as wds
    from kinema.pipelines.loader.webdataset import decoders, shard_urls, with_sidecars

    dataset = (
        wds.WebDataset(shard_urls("clips"), shardshuffle=False)
        .compose(with_sidecars("flow/dis", "tracks/chain"))
        .decode(*decoders())
    )
    for sample in dataset:
        sample["mp4"], sample["json"], sample["flow"].flow(0, 1), sample["tracks"].points_px

Shards may be shuffled, split over nodes and workers, and read in any order; inside a shard samples come as stored.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
import webdataset as wds
from jaxtyping import UInt8

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.artifacts.object_store import ObjectStore
from kinema.pipelines.sidecars.flow_codec import FlowBlob
from kinema.pipelines.sidecars.tracks_codec import Tracks, TracksBlob
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.packets import to_rgb

Sample = dict[str, Any]
_SHARD_NUMBER = slice(-10, -4)  # clips-PLAN8-000123.tar


def shard_urls(artifact: str) -> list[str]:
    """Path or URL of every finished shard of an artifact, in order, for `wds.WebDataset` or `wds.SimpleShardList`.

    WebDataset learns the URL's scheme where it does not know it (s3://, gs://, memory:// through fsspec).
    Raises: ValueError if there is no artifact, or nothing finished in it.
    """
    opened = Artifact.read(artifact)
    urls = [opened.shard_url(shard) for shard in sorted(opened.commits())]
    if not urls:
        raise ValueError(f"{artifact} has no finished shard; let `kinema` finish it first")
    _teach_scheme(urls[0])
    return urls


def with_sidecars(*artifacts: str) -> Callable[[Iterable[Sample]], Iterator[Sample]]:
    """A stage for `.compose` or `wds.DataPipeline`, behind the reader of clips: adds each sidecar's members by key.

    Args: artifacts, flow or tracks made from these clips. Their shards have the clips' numbers, keys and order, so each
        is read once, in step. A clip that a sidecar lacks (quarantined there) is left out, which stderr says.
    Raises: ValueError, on reading, for a sidecar of other clips.
    """
    sidecars = [Artifact.read(url) for url in artifacts]

    def join(samples: Iterable[Sample]) -> Iterator[Sample]:
        shard, readers, left_out = "", [], 0
        for sample in samples:
            if sample["__url__"] != shard:
                _say_left_out(shard, left_out)
                shard, left_out = sample["__url__"], 0
                readers = [_ShardReader(sidecar, shard) for sidecar in sidecars]
            found = [reader.members(sample["__key__"]) for reader in readers]
            if any(members is None for members in found):
                left_out += 1
                continue
            for members in found:
                sample |= members or {}
            yield sample
        _say_left_out(shard, left_out)

    return join


def decoders(frames: slice | None = None) -> list[Callable[[str, bytes], Any]]:
    """Handlers for `.decode(*decoders())`: what each member of a sample becomes.

    `mp4`: uint8 [T, H, W, 3] RGB; `json`: dict; `flow`: FlowBlob, whose `.flow(t, gap)` is float32 [2, h, w] px;
    `tracks`: Tracks; `masks.npz`: dict of arrays. Nothing is unpickled.
    Args: frames, which ones to keep of each clip, such as slice(0, None, 12).
    """
    kept = frames or slice(None)
    by_extension: dict[str, Callable[[bytes], Any]] = {
        "mp4": lambda data: decode_video(data, kept),
        "json": json.loads,
        "flow": FlowBlob,
        "tracks": _decode_tracks,
        "masks.npz": _decode_arrays,
    }

    def handle(key: str, data: bytes) -> Any:
        decode = by_extension.get(key.lstrip("."))
        return decode(data) if decode else None

    return [handle]


def decode_video(mp4: bytes, frames: slice = slice(None)) -> UInt8[np.ndarray, "T H W 3"]:
    """The frames of a stored clip as RGB. Raises: SourceError for a damaged one."""
    with VideoFile(io.BytesIO(mp4)) as video:
        shown = list(video.frames())
    return np.stack([to_rgb(frame) for frame in shown[frames]])


class _ShardReader:
    """One shard of a sidecar, read forwards once: members of the keys asked for, in the shard's order."""

    def __init__(self, sidecar: Artifact, clips_url: str):
        number = clips_url[_SHARD_NUMBER]
        if not number.isdigit():
            raise ValueError(f"{clips_url} is no shard of a clips artifact; read shards from `shard_urls`")
        self._order: dict[str, int] = {key: i for i, key in enumerate(sidecar.plan_of(int(number))["key"].to_pylist())}
        self._name = sidecar.url
        self._samples: Iterator[Sample] = iter(())
        self._next: Sample | None = None
        if sidecar.commit_of(int(number)) is not None:
            self._samples = read_shard(sidecar.shard_url(int(number)))
            self._next = next(self._samples, None)

    def members(self, key: str) -> dict[str, bytes] | None:
        if key not in self._order:
            raise ValueError(f"{self._name} plans no clip {key}: it was made from other clips")
        place = self._order[key]
        while self._next is not None and self._order[self._next["__key__"]] < place:
            self._next = next(self._samples, None)
        if self._next is None or self._next["__key__"] != key:
            return None
        return {name: data for name, data in self._next.items() if not name.startswith("__")}


def read_shard(url: str) -> Iterator[Sample]:
    """Samples of one tar, grouped as WebDataset groups them: {"__key__", "__url__", extension: bytes}."""
    _teach_scheme(url)
    return wds.DataPipeline(
        wds.SimpleShardList([url]), wds.tarfile_to_samples(handler=wds.reraise_exception)
    ).iterator()


def _teach_scheme(url: str) -> None:
    scheme, found, _ = url.partition("://")
    if found and scheme not in wds.gopen_schemes:
        wds.gopen_schemes[scheme] = _open_url


def _open_url(url: str, mode: str = "rb", bufsize: int = 8192, **_: Any) -> BinaryIO:
    folder, name = url.rsplit("/", 1)
    return ObjectStore(folder).open(name)


def _decode_tracks(data: bytes) -> Tracks:
    return TracksBlob(data).tracks()


def _decode_arrays(data: bytes) -> Mapping[str, np.ndarray]:
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _say_left_out(shard: str, count: int) -> None:
    if count:
        sys.stderr.write(f"kinema: {count} clips of {shard} are in a sidecar's quarantine and left out\n")
