"""The page of a search: the query and the clips that move most like it, as films that play side by side."""

from __future__ import annotations

import io
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import pyarrow as pa
import pyarrow.compute as pc

from kinema.pipelines.artifacts import Artifact, read_range
from kinema.pipelines.pictures.motion import encode_mp4
from kinema.pipelines.report.page import Page
from kinema.pipelines.search.query import Query
from kinema.pipelines.video.packets import to_rgb

PAGE, FILMS = "search.html", "films"
FILM_WIDTH = 240
PLAYED = ("h264", "av1")
"""Values of `clip.codec` whose mp4 every browser plays; films of others are encoded anew."""
_SHOWN = ("key", "shard", "source", "start_s", "end_s", "mp4_offset", "mp4_size", "codec", "fps_num", "fps_den")


@dataclass(frozen=True)
class Found:
    """One line of the results."""

    key: str
    score: float
    """Mean cosine of the best windows, at most 1."""
    frame: int
    """First frame, of the clip, of the window that is most like one of the query's."""
    source: str
    """Video that the clip was cut from."""
    start_s: float
    """Where in that video it begins."""


def facts_of(clips: Artifact, keys: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What the clips artifact says of some clips, by key."""
    table = clips.samples(_SHOWN)
    table = table.filter(pc.is_in(table["key"], value_set=pa.array(list(keys), pa.string())))
    return {row["key"]: row for row in table.to_pylist()}


def write_page(
    folder: Path, query: Query, found: Sequence[Found], facts: Mapping[str, Mapping[str, Any]], clips: Artifact,
    numbers: Mapping[str, Any],
) -> Path:  # fmt: skip
    """The page, and its films in a folder beside it, which replaces that of an earlier search; returns its path."""
    films = folder / FILMS
    shutil.rmtree(films, ignore_errors=True)
    films.mkdir(parents=True)

    def film(name: str, data: bytes) -> str:
        (films / name).write_bytes(data)
        return f"{FILMS}/{name}"

    page = Page("Clips that move alike", f"Query: {query.name}")
    page.numbers(numbers)
    page.section("Query")
    if query.frames is not None:
        shown, caption = encode_mp4(query.frames, query.fps), query.name
    else:
        shown, caption = _film_of(clips, facts[query.key]), _caption(facts[query.key])
    page.films([(film("query.mp4", shown), caption)], FILM_WIDTH)
    page.section("Nearest clips", "Best first. 1 is the same motion, 0 what two clips have in common by chance.")
    page.films(
        [
            (
                film(f"{place:03d}_{match.key}.mp4", _film_of(clips, facts[match.key])),
                f"{place}. {match.score:.3f} · {_caption(facts[match.key])}",
            )
            for place, match in enumerate(found, start=1)
        ],
        FILM_WIDTH,
    )
    page.table([{"key": m.key, "score": m.score, "source": m.source, "start, s": m.start_s} for m in found])
    return page.write(folder / PAGE)


def _film_of(clips: Artifact, facts: Mapping[str, Any]) -> bytes:
    """The clip's own mp4, as it lies in its shard, or a film of its frames."""
    mp4 = read_range(clips.shard_url(facts["shard"]), facts["mp4_offset"], facts["mp4_size"])
    if facts["codec"] in PLAYED:
        return mp4
    with av.open(io.BytesIO(mp4), "r") as container:
        return encode_mp4(map(to_rgb, container.decode(video=0)), facts["fps_num"] / facts["fps_den"])


def _caption(facts: Mapping[str, Any]) -> str:
    return f"{facts['source']}, {facts['start_s']:.1f} to {facts['end_s']:.1f} s"
