"""Motion embeddings of a corpus, read a block at a time: an embedding is of a window of some frames of its clip.

Directions are what counts: windows have the corpus's mean taken off, which all embeddings share and which says nothing
of motion, and length 1, so that a product of two is the cosine of their angle.

Shape legend: W windows, C clips, d width of an embedding.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Float, Int

from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.sidecars.sidecar import open_input

MOTION_COLUMN = "motion_mean"
_PLACE = ("key", "motion_offset", "motion_size")


@dataclass(frozen=True)
class Block:
    """Some clips that lie side by side in a shard."""

    keys: tuple[str, ...]
    values: Float[np.ndarray, "W d"]
    """Windows of length 1, clip by clip."""
    starts: Int[np.ndarray, "C"]
    """First window of each clip."""


class MotionWindows:
    """The windows of a features artifact; holds none of them, only their number and mean.

    Args: shards, the finished ones in order; counts, windows of each.
    """

    def __init__(self, features: Artifact, shards: Sequence[int], counts: Sequence[int], mean: Float[np.ndarray, "d"]):
        self.features, self.shards, self.counts, self.mean = features, tuple(shards), tuple(counts), mean

    @classmethod
    def open(cls, url: str, clips: Artifact) -> MotionWindows:
        """Read what the windows of an artifact have in common.

        Raises: ValueError for features that are no motion embeddings, or of other clips.
        """
        features = open_input(url, "features")
        made_from = features.manifest["inputs"].get("clips")
        if made_from != clips.plan8:
            raise ValueError(
                f"features={url} were made from clips {made_from}, clips={clips.url} are {clips.plan8}; give the "
                "clips that these features are of"
            )
        shards = sorted(features.commits())
        total: np.ndarray | None = None
        counts: list[int] = []
        for shard in shards:
            rows = features.rows_of(shard)
            if MOTION_COLUMN not in rows.column_names:
                raise ValueError(
                    f"features={url} holds features of single frames, no motion embeddings; make them with "
                    "`kinema embed` and a DisMo"
                )
            lengths = pc.list_value_length(rows["frames"]).to_numpy()
            counts.append(int(lengths.sum()))
            if rows.num_rows:
                means = np.stack(rows[MOTION_COLUMN].to_numpy())
                part = lengths @ means.astype(np.float64)
                total = part if total is None else total + part
        assert total is not None  # `open_input` refuses an artifact without samples
        return cls(features, shards, counts, (total / sum(counts)).astype(np.float32))

    @property
    def num_windows(self) -> int:
        """Of the whole corpus."""
        return sum(self.counts)

    @property
    def width(self) -> int:
        """d."""
        return len(self.mean)

    def directions(self, windows: Float[np.ndarray, "W d"]) -> Float[np.ndarray, "W d"]:
        """Embeddings without the corpus's mean, at length 1."""
        centred = windows.astype(np.float32) - self.mean
        centred /= np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-12)
        return centred

    def blocks(self, max_windows: int) -> Iterator[Block]:
        """All windows in the artifact's order, at most `max_windows` at a time (a longer clip comes alone)."""
        for shard in self.shards:
            rows = self.features.rows_of(shard).select([*_PLACE, "frames"])
            lengths = pc.list_value_length(rows["frames"]).to_numpy()
            places = rows.select(_PLACE).to_pylist()
            first = 0
            while first < len(places):
                inside = np.cumsum(lengths[first:]) <= max_windows
                stop = first + max(1, int(inside.sum()))
                yield self._read(shard, places[first:stop])
                first = stop

    def of_key(self, key: str) -> Float[np.ndarray, "W d"] | None:
        """Windows of one clip, as in `blocks`; None if it has none."""
        return self.of_keys([key]).get(key)

    def of_keys(self, keys: Sequence[str]) -> dict[str, Float[np.ndarray, "W d"]]:
        """Windows of some clips, those that there are, each read by itself."""
        wanted = set(keys)
        places = self.features.samples([*_PLACE, "shard"])
        places = places.filter(pc.is_in(places["key"], value_set=_strings(wanted)))
        found = {}
        for place in places.to_pylist():
            found[place["key"]] = self._read(place["shard"], [place]).values
        return found

    def _read(self, shard: int, places: Sequence[dict[str, Any]]) -> Block:
        """Clips that follow one another, by one ranged read."""
        start = places[0]["motion_offset"]
        size = places[-1]["motion_offset"] + places[-1]["motion_size"] - start
        data = read_range(self.features.shard_url(shard), start, size)
        parts = []
        for place in places:
            at = place["motion_offset"] - start
            parts.append(np.load(io.BytesIO(data[at : at + place["motion_size"]]), allow_pickle=False))
        starts = np.cumsum([0, *(len(part) for part in parts[:-1])])
        return Block(tuple(p["key"] for p in places), self.directions(np.concatenate(parts)), starts)


def _strings(values: set[str]) -> Any:
    return pa.array(sorted(values), pa.string())
