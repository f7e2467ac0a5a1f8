"""`kinema search`: motion embeddings and a query in, the clips that move alike out, with a page of films."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kinema.configs import SearchConfig
from kinema.configs.json_text import json_text
from kinema.pipelines.search.approximate import ApproximateIndex, load_faiss, recall
from kinema.pipelines.search.exact import Match, Nearest, search
from kinema.pipelines.search.page import Found, facts_of, write_page
from kinema.pipelines.search.query import Query, copies_of, read_query
from kinema.pipelines.search.registered import fetch_index, register_index, registered_model
from kinema.pipelines.search.windows import MotionWindows
from kinema.pipelines.sidecars.sidecar import open_input

__all__ = ["SearchSummary", "run"]
RESULTS = "results.json"
REGISTRY = "models:/"


@dataclass(frozen=True)
class SearchSummary:
    """The clips found, best first, and how they were."""

    query: str
    results: tuple[Found, ...]
    method: str
    """exact or approximate."""
    windows: int
    """Motion embeddings of the corpus."""
    recall: float | None
    """Approximate: share of the k best clips that the index finds, measured when it was made."""
    page: str
    registered: str
    """Model version that the index lies beside, if it was registered."""
    seconds: float


def run(config: SearchConfig, *, report: Callable[[str], None] | None = None) -> SearchSummary:
    """Find the clips whose motion is most like that of `config.query`.

    Raises: ValueError for a query, features or model that do not fit together, or an extra that is not installed.
    """
    started = time.monotonic()
    say = report or (lambda line: print(line, file=sys.stderr, flush=True))
    _check_places(config)
    clips = open_input(config.clips, "clips")
    windows = MotionWindows.open(config.features, clips)
    approximate = _is_approximate(config, windows)
    query = read_query(config, windows, clips)
    copies = {} if config.copies else copies_of(clips)
    nearest = Nearest(config.k, copies, [copies.get(query.key, query.key)] if query.key else [])
    index: ApproximateIndex | None = None
    registered = ""
    if approximate:
        index, registered = _index(config, windows, say)
        matches = index.search(windows, query.windows, nearest, config.num_probes, config.candidates)
    else:
        say(f"search: comparing with {windows.num_windows:,} windows")
        matches = search(windows.blocks(config.block_windows), [query.windows], [nearest])[0]
    facts = facts_of(clips, [match.key for match in matches] + ([query.key] if query.key else []))
    found = tuple(_found(query, windows, matches, facts))
    known = index.facts.get("recall") if index else None
    numbers: dict[str, int | float] = {"clips found": len(found), "windows compared with": windows.num_windows}
    if known is not None:
        numbers["recall of the index"] = known
    folder = Path(config.out)
    page = write_page(folder, query, found, facts, clips, numbers)
    summary = SearchSummary(
        query=query.name,
        results=found,
        method="approximate" if approximate else "exact",
        windows=windows.num_windows,
        recall=known,
        page=str(page),
        registered=registered,
        seconds=round(time.monotonic() - started, 2),
    )
    (folder / RESULTS).write_text(json_text(dataclasses.asdict(summary), indent=2) + "\n")
    return summary


def _check_places(config: SearchConfig) -> None:
    """Raises: ValueError without a query, or a folder to write to."""
    for name, what in (("query", "a clip's key, or a video file"), ("out", "a folder for the page")):
        if not getattr(config, name):
            raise ValueError(f"{name}= is empty; give {what}")
    if "://" in config.out:
        raise ValueError(f"out={config.out} is a URL; the page is written to a folder of this machine")


def _is_approximate(config: SearchConfig, windows: MotionWindows) -> bool:
    """Whether an index is used. Raises: ValueError for what could not be done later on."""
    if config.method == "approximate" or (config.method == "auto" and windows.num_windows > config.exact_up_to):
        load_faiss()
        if config.register:
            registered_model(windows)
        return True
    if config.register or config.index:
        named = "register=true" if config.register else f"index={config.index}"
        raise ValueError(
            f"{named} is about an approximate index, but {windows.num_windows:,} windows are compared exactly; add "
            "method=approximate"
        )
    return False


def _index(config: SearchConfig, windows: MotionWindows, say: Callable[[str], None]) -> tuple[ApproximateIndex, str]:
    """The index of `index=`, made where it is missing; and the model version that it was registered beside."""
    if config.index.startswith(REGISTRY):
        with tempfile.TemporaryDirectory(prefix="kinema-index-") as place:
            return ApproximateIndex.load(fetch_index(config.index, windows, Path(place)), windows), ""
    folder = Path(config.index or Path(config.out) / "index")
    if folder.is_dir() and (config.index or ApproximateIndex.fits(folder, windows)):
        index = ApproximateIndex.load(folder, windows)
    else:
        say(f"search: indexing {windows.num_windows:,} windows in {folder}")
        index = ApproximateIndex.build(windows, config.block_windows)
        if config.recall_queries:
            share = recall(index, windows, config.k, config.recall_queries, config.num_probes, config.candidates,
                           config.block_windows)  # fmt: skip
            index.facts["recall"] = share
            say(f"search: the index finds {share:.1%} of the {config.k} best clips of {config.recall_queries} queries")
        index.save(folder)
    return index, register_index(folder, windows, index.facts) if config.register else ""


def _found(query: Query, windows: MotionWindows, matches: list[Match], facts: dict[str, dict]) -> list[Found]:
    """Matches with the place of their best window, and where they come from."""
    keys = [match.key for match in matches]
    values = windows.of_keys(keys)
    table = windows.features.samples(["key", "frames"])
    table = table.filter(pc.is_in(table["key"], value_set=pa.array(keys, pa.string())))
    frames = dict(zip(table["key"].to_pylist(), table["frames"].to_pylist(), strict=True))
    found = []
    for match in matches:
        best = int(np.argmax((values[match.key] @ query.windows.T).max(axis=1)))
        known = facts[match.key]
        found.append(
            Found(match.key, round(match.score, 6), frames[match.key][best], known["source"], known["start_s"])
        )
    return found
