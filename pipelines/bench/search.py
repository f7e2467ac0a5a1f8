"""A million windows: exact search in blocks against one product of the query with all of them in memory; an index.

Also `python -m kinema.pipelines.bench.search WINDOWS WIDTH`. The corpus is an artifact on disk whose embeddings are
drawn around 2,000 centres. Processor seconds; memory is what Python and NumPy asked for meanwhile.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.embed import motion
from kinema.pipelines.search.approximate import ApproximateIndex, recall
from kinema.pipelines.search.exact import Nearest, search
from kinema.pipelines.search.windows import MotionWindows

NUM_WINDOWS, WIDTH = 1_000_000, 128
WINDOWS_PER_CLIP, CLIPS_PER_SHARD = 50, 500
CENTRES, SPREAD = 2000, 0.7
BLOCK_WINDOWS = 16_384
K, PROBES, CANDIDATES, RECALL_QUERIES = 10, 16, 200, 20


def run(num_windows: int = NUM_WINDOWS, width: int = WIDTH, index: bool = True) -> list[dict[str, Any]]:
    """Rows of {name, value, baseline, ratio, unit}; the baseline holds all windows in memory.

    The rows of the index compare with exact search: its time for a query, and the share of the best clips it finds.
    """
    with tempfile.TemporaryDirectory(prefix="kinema-bench-") as name:
        clips = _clips(Path(name), num_windows // WINDOWS_PER_CLIP)
        _features(Path(name), clips, width)
        windows = MotionWindows.open(f"{name}/features", clips)
        key = clips.samples(["key"])["key"][7].as_py()
        query = windows.of_key(key)
        assert query is not None

        def exactly() -> Any:
            return search(windows.blocks(BLOCK_WINDOWS), [query], [Nearest(K, {}, [key])])[0]

        def at_once() -> Any:
            return search(windows.blocks(num_windows), [query], [Nearest(K, {}, [key])])[0]

        size = f"{num_windows:,} windows x {width}"
        rows = [
            _row(f"exact, {size}", _seconds(exactly), _seconds(at_once), "s of processor time"),
            _row("memory meanwhile", _megabytes(exactly), num_windows * width * 4 / 1e6, "MB, of all windows"),
        ]
        return rows + (_index_rows(windows, query, key, rows[0]["value"]) if index else [])


def _index_rows(windows: MotionWindows, query: np.ndarray, key: str, exact_s: float) -> list[dict[str, Any]]:
    made: list[ApproximateIndex] = []
    build_s = _seconds(lambda: made.append(ApproximateIndex.build(windows, BLOCK_WINDOWS)))
    found_s = _seconds(lambda: made[0].search(windows, query, Nearest(K, {}, [key]), PROBES, CANDIDATES))
    share = recall(made[0], windows, K, RECALL_QUERIES, PROBES, CANDIDATES, BLOCK_WINDOWS)
    return [
        _row("making the index", build_s, exact_s, "s, of an exact search"),
        _row("a query by the index", found_s, exact_s, "s, of an exact search"),
        _row(f"recall of the {K} best", share, 1.0, f"of {RECALL_QUERIES} queries"),
    ]


def _clips(folder: Path, count: int) -> Artifact:
    """Keys of clips without any frames."""
    artifact = Artifact.open(folder / "clips", kind="clips", config={"bench": count})
    keys = [f"{number:032x}" for number in range(count)]
    shards = pa.array([number // CLIPS_PER_SHARD for number in range(count)], pa.int32())
    artifact.append_plan(pa.table({"shard": shards, "key": keys, "source": keys}))
    for shard in artifact.pending():
        with artifact.shard_writer(shard) as writer:
            for key in writer.planned:
                writer.add(key, {"json": b"{}"}, {"source": key})
            writer.commit()
    artifact.finalize()
    return artifact


def _features(folder: Path, clips: Artifact, width: int) -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CENTRES, width)).astype(np.float32)
    config = {"model_hash": "0" * 64, "fps": 6.0}
    features = Artifact.open(folder / "features", kind="features", config=config, inputs={"clips": clips.plan8})
    features.append_plan(clips.samples(["shard", "key", "source"]))
    for shard in features.pending():
        with features.shard_writer(shard, motion.COLUMNS) as writer:
            for key in writer.planned:
                noise = rng.normal(size=(WINDOWS_PER_CLIP, width)).astype(np.float32)
                values = centres[rng.integers(CENTRES)] + SPREAD * noise
                buffer = io.BytesIO()
                np.save(buffer, values, allow_pickle=False)
                row = {"source": key, "frames": list(range(WINDOWS_PER_CLIP)), "motion_mean": values.mean(0).tolist()}
                writer.add(key, {"motion.npy": buffer.getvalue()}, row)
            writer.commit(input_hashes={"clips": "0"})
    features.finalize()


def _seconds(call: Callable[[], Any]) -> float:
    started = time.process_time()
    call()
    return time.process_time() - started


def _megabytes(call: Callable[[], Any]) -> float:
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def _row(name: str, value: float, baseline: float, unit: str) -> dict[str, Any]:
    return {"name": name, "value": value, "baseline": baseline, "ratio": value / baseline, "unit": unit}


def main(arguments: Sequence[str]) -> int:
    """See the top of the file."""
    from kinema.pipelines.bench.__main__ import print_rows

    num_windows = int(arguments[0]) if arguments else NUM_WINDOWS
    width = int(arguments[1]) if len(arguments) > 1 else WIDTH
    print_rows(run(num_windows, width))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
