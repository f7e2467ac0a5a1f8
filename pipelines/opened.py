"""Artifacts as collections: iterate, index by number or key, frames, flow, tracks and features as arrays."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.loader import Clip, ClipIndex
from kinema.pipelines.report.inspect import clips_beside


class MotionClips:
    """Clips with their flow and tracks, in the order of the artifact.

    `clips[3]` or `clips["KEY"]` is a `Clip`: `.frames()` or `.frames([0, 5])` uint8 [n, H, W, 3]; `.flow(t, gap)`
    float32 [2, h, w] in pixels of the flow's size; `.tracks()`; `.meta`, `.key`, `.num_frames`, `.fps`, `.flow_pairs`.
    """

    def __init__(self, index: ClipIndex, url: str):
        self.index, self.url = index, url
        self._numbers = {key: number for number, key in enumerate(index.keys)}

    def __repr__(self) -> str:
        return f"MotionClips({self.url!r}: {len(self)} clips)"

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, which: int | str) -> Clip:
        """Raises: KeyError for an unknown key, IndexError for a number past the end."""
        if isinstance(which, str):
            return self.index.clip(self._numbers[which])
        return self.index.clip(which if which >= 0 else len(self) + which)

    def __iter__(self) -> Iterator[Clip]:
        return (self.index.clip(number) for number in range(len(self)))

    @property
    def keys(self) -> list[str]:
        """Key of every clip."""
        return list(self._numbers)

    def to_webdataset(self) -> Any:
        """The shards as a `webdataset.WebDataset` of undecoded members (json, mp4, ...)."""
        import webdataset

        artifact = Artifact.read(self.url)
        urls = [artifact.shard_url(shard) for shard in sorted(artifact.commits())]
        return webdataset.WebDataset(urls, shardshuffle=False)

    def to_torch(self, frames_per_clip: int = 1) -> torch.utils.data.Dataset:
        """A map-style dataset of {"key", "frames"} and, where there is flow, that of the clip's first pair: "flow_px",
        float32 [2, h, w], and "flow_pair", (t, gap).

        Args: frames_per_clip, spread over the clip: uint8 [n, H, W, 3].
        """
        return _Torch(self, frames_per_clip)


class _Torch(torch.utils.data.Dataset):
    def __init__(self, clips: MotionClips, frames_per_clip: int):
        self.clips, self.count = clips, frames_per_clip

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> dict[str, Any]:
        clip = self.clips[number]
        chosen = np.linspace(0, clip.num_frames - 1, self.count).round().astype(int).tolist()
        sample = {"key": clip.key, "frames": torch.from_numpy(np.ascontiguousarray(clip.frames(chosen)))}
        if clip.flow_pairs:
            sample["flow_px"] = torch.from_numpy(np.ascontiguousarray(clip.flow(*clip.flow_pairs[0])))
            sample["flow_pair"] = torch.tensor(clip.flow_pairs[0])
        return sample


class FeatureSet:
    """Features by clip: `features["KEY"]` is {name: array}, maps [T, C, h, w] or means [T, C] of embedded frames."""

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        self._rows = {row["key"]: row for row in artifact.samples().to_pylist()}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    @property
    def keys(self) -> list[str]:
        """Key of every clip."""
        return list(self._rows)

    def __getitem__(self, key: str) -> dict[str, np.ndarray]:
        row = self._rows[key]
        url = self.artifact.shard_url(row["shard"])
        names = [name.removesuffix("_offset") for name, v in row.items() if name.endswith("_offset") and v is not None]
        found = {}
        for name in names:
            data = read_range(url, row[f"{name}_offset"], row[f"{name}_size"])
            found[name] = np.load(io.BytesIO(data), allow_pickle=False)
        return found


def open_collection(url: str, flow: str = "", tracks: str = "") -> MotionClips | FeatureSet:
    """See `kinema.open`."""
    artifact = Artifact.read(url)
    if artifact.kind == "features":
        return FeatureSet(artifact)
    if artifact.kind == "clips":
        index = ClipIndex.open(url, flow or None, tracks or None, skip_duplicates=False)
        return MotionClips(index, url)
    clips = clips_beside(artifact)
    if clips is None:
        raise ValueError(
            f"{url} holds {artifact.kind}; its clips were not found beside it: open the clips with flow={url}"
        )
    sidecars = {"flow": flow, "tracks": tracks} | {artifact.kind: url}
    joined = ClipIndex.open(clips, sidecars["flow"] or None, sidecars["tracks"] or None, skip_duplicates=False)
    return MotionClips(joined, clips)
