"""Where a rank keeps its files: in the run's folder, or, for a run in a bucket, in a folder of its own machine."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.bucket_run import fetch_checkpoint, fetch_run, local_folder, run_store
from kinema.pipelines.train.exchange import Exchange
from kinema.pipelines.train.loop import TrainJob
from kinema.pipelines.train.meter import PROGRESS_FILE
from kinema.pipelines.train.mirror import RunMirror
from kinema.pipelines.train.parallel import Place, same_on_all_ranks

_MIRROR_EVERY_S = 1.0


@contextlib.contextmanager
def rank_folder(job: TrainJob, place: Place, exchange: Exchange) -> Iterator[TrainJob]:
    """The job with the folder of this rank; where ranks share none, with the newest checkpoint of the bucket in it.

    Rank 0 writes checkpoints and metrics; meanwhile its folder is copied to the URL and its progress to the driver.
    """
    if not job.url:
        yield job
        return
    folder = Path(f"{local_folder(job.url)}-rank{place.rank}")
    if place.rank:
        shutil.rmtree(folder, ignore_errors=True)
        with_newest(job.url, folder, same_on_all_ranks("", place))
        yield dataclasses.replace(job, run=folder)
        return
    here = checkpoint.latest_checkpoint(folder)
    fetch_run(job.url, folder, "" if here is None else here.name)
    folder.mkdir(parents=True, exist_ok=True)
    config = job.config
    with RunMirror(job.url, folder, config.keep_checkpoints, config.keep_best, _MIRROR_EVERY_S) as mirror:
        mirror.copy()  # what this machine has beyond the bucket, before the others look there
        newest = checkpoint.latest_checkpoint(folder)
        same_on_all_ranks("" if newest is None else newest.name, place)
        with _progress_told(folder / PROGRESS_FILE, exchange):
            yield dataclasses.replace(job, run=folder)


def with_newest(url: str, folder: Path, name: str) -> None:
    """The checkpoint of that name in the folder; an empty folder without a name."""
    folder.mkdir(parents=True)
    if name:
        fetch_checkpoint(run_store(url), name, folder)


@contextlib.contextmanager
def _progress_told(path: Path, exchange: Exchange, every_s: float = 0.5) -> Iterator[None]:
    """Tell the driver what rank 0 writes to its progress file, from a thread."""
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(every_s):
            if path.is_file():
                exchange.put(path.name, path.read_text())

    thread = threading.Thread(target=tell, name="kinema-progress-told", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
