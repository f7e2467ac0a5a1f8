"""An index that proposes clips without comparing with every window; what it proposes is then compared exactly.

Windows lie in an inverted file of FAISS (extra `search`): grouped around centres, a byte for each of their numbers. A
query looks at the groups nearest to each of its windows. On disk an index is a folder: `windows.faiss`, `clips.parquet`
(key and first window of every clip, in order) and `index.json`.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from kinema.configs.json_text import json_text
from kinema.pipelines.artifacts.tables import parquet_bytes, read_parquet
from kinema.pipelines.search.exact import Match, Nearest, clip_scores, search
from kinema.pipelines.search.windows import Block, MotionWindows

EXTRA = "pip install 'kinema[search]'"
FORMAT = 1
INDEX_FILES = ("windows.faiss", "clips.parquet", "index.json")
TRAINING_WINDOWS_PER_GROUP = 64
LEAST_WINDOWS_PER_GROUP = 39
"""Below which FAISS says that centres are not well known."""
SEED = 0


def load_faiss() -> Any:
    """The library. Raises: ValueError if it is not installed."""
    try:
        import faiss  # an optional dependency
    except ImportError as error:
        raise ValueError(
            f"an approximate index needs faiss, which is not installed ({error}): {EXTRA}; or use method=exact"
        ) from None
    return faiss


@dataclass(frozen=True)
class ApproximateIndex:
    """A trained index over all windows of one features artifact."""

    faiss_index: Any
    keys: tuple[str, ...]
    """Of the clips, in the order of their windows."""
    first_window: np.ndarray
    """[C], number of each clip's first window."""
    facts: dict[str, Any]
    """What index.json says: features (their hash), windows, width, groups, recall."""

    @classmethod
    def build(cls, windows: MotionWindows, block_windows: int) -> ApproximateIndex:
        """Two passes over the corpus: a sample of windows gives the centres, then all are added."""
        faiss = load_faiss()
        groups = max(1, min(round(windows.num_windows**0.5), windows.num_windows // LEAST_WINDOWS_PER_GROUP))
        index = faiss.index_factory(windows.width, f"IVF{groups},SQ8", faiss.METRIC_INNER_PRODUCT)
        index.train(_sample(windows, groups * TRAINING_WINDOWS_PER_GROUP, block_windows))
        keys: list[str] = []
        firsts: list[np.ndarray] = []
        for block in windows.blocks(block_windows):
            keys += block.keys
            firsts.append(block.starts + index.ntotal)
            index.add(block.values)
        facts = {"format": FORMAT, "features": windows.features.manifest_hash(), "windows": index.ntotal,
                 "width": windows.width, "groups": groups}  # fmt: skip
        return cls(index, tuple(keys), np.concatenate(firsts), facts)

    @staticmethod
    def fits(folder: Path, windows: MotionWindows) -> bool:
        """Whether a folder says that its index is of these features."""
        try:
            facts = json.loads((folder / "index.json").read_text())
            return (facts["format"], facts["features"]) == (FORMAT, windows.features.manifest_hash())
        except (OSError, ValueError, LookupError, TypeError):
            return False

    @classmethod
    def load(cls, folder: Path, windows: MotionWindows) -> ApproximateIndex:
        """From disk. Raises: ValueError for a damaged index, or one of other features."""
        faiss = load_faiss()
        try:
            facts = json.loads((folder / "index.json").read_text())
            table = read_parquet((folder / "clips.parquet").read_bytes())
            index = faiss.read_index(str(folder / "windows.faiss"))
            kept = (facts["format"], facts["features"], facts["windows"])
        except (OSError, ValueError, LookupError, RuntimeError, pa.ArrowException) as error:
            why = " ".join(str(error).split())[:200]
            raise ValueError(f"index={folder} cannot be read ({why}); remove it, and it is made anew") from None
        wanted = (FORMAT, windows.features.manifest_hash(), index.ntotal)
        if kept != wanted:
            raise ValueError(
                f"index={folder} was made from other features ({kept[1][:12]}, now {wanted[1][:12]}); remove it, and "
                "it is made anew, or give another index="
            )
        return cls(index, tuple(table["key"].to_pylist()), table["first_window"].to_numpy(), facts)

    def save(self, folder: Path) -> None:
        """Write the folder, which appears whole or not at all."""
        faiss = load_faiss()
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            faiss.write_index(self.faiss_index, str(temporary / "windows.faiss"))
            table = pa.table({"key": list(self.keys), "first_window": self.first_window})
            (temporary / "clips.parquet").write_bytes(parquet_bytes(table))
            (temporary / "index.json").write_text(json_text(self.facts, indent=2) + "\n")
            temporary.chmod(0o755)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def proposals(self, query: Float[np.ndarray, "m d"], num_probes: int, candidates: int) -> list[str]:
        """Keys of the clips that the nearest windows to the query's are of."""
        faiss = load_faiss()
        parameters = faiss.SearchParametersIVF(nprobe=min(num_probes, self.facts["groups"]))
        _, numbers = self.faiss_index.search(query, min(candidates, self.facts["windows"]), params=parameters)
        found = np.unique(numbers[numbers >= 0])
        clips = np.unique(np.searchsorted(self.first_window, found, side="right") - 1)
        return [self.keys[number] for number in clips]

    def search(
        self,
        windows: MotionWindows,
        query: Float[np.ndarray, "m d"],
        nearest: Nearest,
        num_probes: int,
        candidates: int,
    ) -> list[Match]:
        """The best of the proposed clips, with their exact scores."""
        keys = self.proposals(query, num_probes, candidates)
        starts, counts = np.zeros(1, np.int64), np.array([len(query)], np.float32)
        for key, values in sorted(windows.of_keys(keys).items()):
            block = Block((key,), values, np.zeros(1, np.int64))
            nearest.offer(block.keys, clip_scores(block, query, starts, counts)[:, 0])
        return nearest.matches()


def recall(
    index: ApproximateIndex, windows: MotionWindows, k: int, num_queries: int, num_probes: int, candidates: int,
    block_windows: int,
) -> float:  # fmt: skip
    """Share of the k best clips, found by exact search, that the index finds too: mean over clips of the corpus.

    Args: num_queries, clips that are drawn; the corpus is read once for all of them.
    """
    rng = np.random.default_rng(SEED)
    drawn = sorted(rng.choice(len(index.keys), min(num_queries, len(index.keys)), replace=False))
    keys = [index.keys[number] for number in drawn]
    by_key = windows.of_keys(keys)
    queries = [by_key[key] for key in keys]
    truth = search(windows.blocks(block_windows), queries, [Nearest(k, {}, [key]) for key in keys])
    shares = []
    for key, query, best in zip(keys, queries, truth, strict=True):
        found = index.search(windows, query, Nearest(k, {}, [key]), num_probes, candidates)
        shares.append(len({m.key for m in found} & {m.key for m in best}) / max(1, len(best)))
    return float(np.mean(shares))


def _sample(windows: MotionWindows, count: int, block_windows: int) -> Float[np.ndarray, "n d"]:
    """About `count` windows, spread evenly over the corpus by chance."""
    rng = np.random.default_rng(SEED)
    share = min(1.0, count / windows.num_windows)
    parts: Sequence[np.ndarray] = [
        block.values[rng.random(len(block.values)) < share] for block in windows.blocks(block_windows)
    ]
    return np.concatenate(parts)
