"""Batches without end, the same ones however many workers read them, from any position on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from kinema.configs import LoaderConfig
from kinema.pipelines.errors import StageError
from kinema.pipelines.loader.index import ClipIndex
from kinema.pipelines.loader.memory import keep_freed_memory
from kinema.pipelines.loader.order import Order
from kinema.pipelines.loader.reader import Account, Batch, BatchReader, Reading, ReadSample, ReadSamples
from kinema.pipelines.loader.stream import ShardCache, StreamOrder

_SHOWN_DAMAGES = 5
# An index with more bytes goes to workers as a file that they share; a smaller one is copied to each.
_SHARE_ABOVE_BYTES = 32_000_000


class Loader:
    """Yields batches epoch after epoch: a dict of stacked tensors, and `key`, the clips' keys.

    Order and content of batches follow from the seed, the index and the global batch size alone. With workers they
    are read by processes of torch's loader (started by a fork server, so that no lock or thread of this process is
    copied); the workers live as long as the iteration.

    Args: batch_size, samples of a batch on this rank; the global batch is batch_size * world_size; warn_after_s,
        a wait for a batch longer than this is reported on stderr, again and again; pin_memory, for copies to a GPU
        that run beside computation; read_samples, reads several samples of a clip at once: with samples_per_clip > 1 a
        reader then takes a whole shuffle window at a time and opens each clip once. The batches are the same.
    Raises while iterating: StageError when the data gives no usable sample, or a worker dies.
    """

    def __init__(
        self,
        index: ClipIndex,
        read_sample: ReadSample,
        config: LoaderConfig,
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        warn_after_s: float = 30.0,
        pin_memory: bool = False,
        read_samples: ReadSamples | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"loader batch_size={batch_size} must be at least 1")
        if not 0 <= rank < world_size:
            raise ValueError(f"loader rank={rank} is not one of world_size={world_size} ranks")
        if seed < 0:
            raise ValueError(f"loader seed={seed} must not be negative")
        self.index, self.read_sample, self.config = index, read_sample, config
        self.read_samples = read_samples if config.samples_per_clip > 1 else None
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.warn_after_s, self.pin_memory = warn_after_s, pin_memory
        self.order = make_order(index, config, seed, batch_size * world_size)
        self._position = 0
        self._account = Account()
        self._num_batches, self._wait_s = 0, 0.0
        # Weak, so that an iteration which nobody holds any more ends, and its workers with it.
        self._running: Callable[[], Generator[Batch, None, None] | None] = _none

    @property
    def epoch(self) -> int:
        """Epoch of the next sample."""
        return self._position // self.order.num_samples

    @property
    def num_samples(self) -> int:
        """Samples in an epoch, over all ranks."""
        return self.order.num_samples

    def __iter__(self) -> Iterator[Batch]:
        """Batches from the current position on; ends an earlier iteration and its workers."""
        self.close()
        batches = self._batches()
        self._running = weakref.ref(batches)
        return batches

    def state_dict(self) -> dict[str, int]:
        """Position behind the last batch that was handed out; plain numbers, equal on all ranks."""
        epoch, samples_consumed = divmod(self._position, self.order.num_samples)
        return {
            "epoch": epoch,
            "samples_consumed": samples_consumed,
            "seed": self.order.seed,
            "num_clips": self.order.num_clips,
            "samples_per_clip": self.order.samples_per_clip,
            "lanes": self._lanes,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue behind that position at the next `iter`; workers and ranks may be others than before.

        Raises: ValueError when the state belongs to other data or another seed.
        """
        mine = self.state_dict()
        for name in ("seed", "num_clips", "samples_per_clip", "lanes"):
            if (found := state.get(name, 0)) != mine[name]:
                raise ValueError(
                    f"the saved loader position has {name}={found}, this loader {mine[name]}; "
                    "continue with the same data and settings, or start a new run"
                )
        self.close()
        self._position = state["epoch"] * self.order.num_samples + state["samples_consumed"]

    @property
    def _lanes(self) -> int:
        """Lanes of stream mode; 0 in random mode."""
        return self.order.lanes if isinstance(self.order, StreamOrder) else 0

    def stats(self) -> dict[str, Any]:
        """Totals of this rank since the loader was made: samples, skips by reason, bytes, frames, seconds waited."""
        return {
            "batches": self._num_batches,
            "samples": self._num_batches * self.batch_size,
            "skipped": dict(self._account.skipped),
            "damaged": dict(self._account.damaged),
            "bytes_read": self._account.bytes_read,
            "frames_decoded": self._account.frames_decoded,
            "wait_s": self._wait_s,
        }

    def close(self) -> None:
        """End the iteration and its workers; harmless when there is none."""
        running = self._running()
        if running is not None:
            running.close()

    def _batches(self) -> Generator[Batch, None, None]:
        with contextlib.ExitStack() as stack:
            watch = stack.enter_context(_Watch(self.warn_after_s, self._warn_of_starvation))
            index = self._with_shards(stack)
            readings = self._read_here(index) if self.config.num_workers == 0 else self._read_in_workers(index, stack)
            while True:
                reading = self._next(readings, watch)
                self._settle(reading)
                reading.batches.reverse()
                while reading.batches:
                    self._position += self.batch_size * self.world_size
                    self._num_batches += 1
                    yield reading.batches.pop()

    def _jobs(self) -> Iterator[list[list[int]]]:
        """Sample numbers of this rank's batches; one batch at a time, or those that begin in the same window."""
        position = self._position
        while True:
            job: list[list[int]] = []
            window = self.order.window(position)
            while not job or (self.read_samples is not None and self.order.window(position) == window):
                first = position + self.rank * self.batch_size
                job.append(list(range(first, first + self.batch_size)))
                position += self.batch_size * self.world_size
            yield job

    def _with_shards(self, stack: contextlib.ExitStack) -> ClipIndex:
        """The index; in stream mode with the folder of whole shards, a temporary one unless a cache is named."""
        if self.config.mode == "stream":
            # A shard may still be on its way when an error ends the reading.
            made = tempfile.TemporaryDirectory(prefix="kinema-shards-", ignore_cleanup_errors=True)
            folder = self.config.cache_dir or stack.enter_context(made)
            self.index.shards = ShardCache(folder, int(self.config.cache_gb * 1e9))
        return self.index

    def _read_here(self, index: ClipIndex) -> Iterator[Reading]:
        reader = BatchReader(index, self.read_sample, self.order, self.read_samples, self.config.lookahead)
        for job in self._jobs():
            threads = torch.get_num_threads()
            # As in a worker: the number of threads may change the last bits of a sum.
            torch.set_num_threads(1)
            try:
                reading = reader[job]
            finally:
                torch.set_num_threads(threads)
            yield reading

    def _read_in_workers(self, index: ClipIndex, stack: contextlib.ExitStack) -> Iterator[Reading]:
        if index.table.nbytes > _SHARE_ABOVE_BYTES:
            index = index.on_disk(stack.enter_context(tempfile.TemporaryDirectory(prefix="kinema-loader-")))
        context = multiprocessing.get_context("forkserver")
        # Imported once, in the server, instead of by every worker.
        context.set_forkserver_preload(["kinema.pipelines.loader.loader"])
        loader: DataLoader[Reading] = DataLoader(
            BatchReader(index, self.read_sample, self.order, self.read_samples, self.config.lookahead),
            sampler=self._jobs(),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=self.config.num_workers,
            prefetch_factor=self.config.prefetch,
            multiprocessing_context=context,
            worker_init_fn=_start_worker,
            pin_memory=self.pin_memory,
            # Without one of its own, torch's loader would draw from the generator of the training.
            generator=torch.Generator(),
        )
        readings = iter(loader)
        stack.callback(_shut_down, readings)
        return readings

    def _next(self, readings: Iterator[Reading], watch: _Watch) -> Reading:
        started = time.perf_counter()
        watch.wait_begins()
        try:
            return next(readings)
        except (RuntimeError, OSError, EOFError) as error:
            # What a dead worker looks like depends on when it died; an error inside a worker names itself.
            if self.config.num_workers == 0 or "in DataLoader worker process" in str(error):
                raise
            raise StageError(
                f"a loader worker of rank {self.rank} died ({str(error).rstrip('.')}): out of memory, or killed? "
                "Lower loader.num_workers or loader.prefetch, then start again: the run resumes"
            ) from error
        finally:
            watch.wait_ends()
            self._wait_s += time.perf_counter() - started

    def _settle(self, reading: Reading) -> None:
        new = {key: m for key, m in reading.account.damaged.items() if key not in self._account.damaged}
        for number, message in enumerate(new.values(), start=len(self._account.damaged)):
            if number < _SHOWN_DAMAGES:
                sys.stderr.write(f"loader: sample left out, {message}\n")
            elif number == _SHOWN_DAMAGES:
                sys.stderr.write("loader: more damaged samples are counted, not shown; run `kinema verify`\n")
        self._account.damaged.update(new)
        self._account.skipped.update(reading.account.skipped)
        if reading.failure is not None:
            raise StageError(reading.failure)
        self._account.bytes_read += reading.account.bytes_read
        self._account.frames_decoded += reading.account.frames_decoded

    def _warn_of_starvation(self, waited_s: float) -> None:
        state = self.state_dict()
        readers = f"{self.config.num_workers} workers" if self.config.num_workers else "this process"
        sys.stderr.write(
            f"loader: rank {self.rank} has waited {waited_s:.0f} s for the batch behind sample "
            f"{state['samples_consumed']} of epoch {state['epoch']}, read by {readers} from {self.index.clips_url}: "
            "slow storage, too few loader.num_workers, or a read_sample that hangs?\n"
        )
        sys.stderr.flush()


def make_order(index: ClipIndex, config: LoaderConfig, seed: int, global_batch: int) -> Order:
    """The order of samples that the config asks for. Raises: ValueError for lanes that do not divide the batch."""
    if config.mode == "random":
        return Order(len(index), seed, config.samples_per_clip, config.shuffle_window)
    if global_batch % config.lanes:
        raise ValueError(
            f"loader.lanes={config.lanes} does not divide the global batch of {global_batch}; use a divisor of it"
        )
    shards = index.table["shard"].to_numpy()
    return StreamOrder(
        len(index), seed, config.samples_per_clip, config.shuffle_window, shards=shards, lanes=config.lanes,
        global_batch=global_batch,
    )  # fmt: skip


class _Watch:
    """Calls `warn` with the seconds waited, for every `every_s` seconds that a wait lasts.

    One thread looks now and then; a wait costs the waiting side nothing but noting its beginning and end.
    """

    def __init__(self, every_s: float, warn: Callable[[float], None]):
        self._every_s = every_s
        # Weak: the thread must not keep a loader alive that nobody iterates any more.
        self._warn = weakref.WeakMethod(warn)
        self._since: float | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="loader-watch", daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def wait_begins(self) -> None:
        """The other side begins to wait."""
        self._since = time.monotonic()

    def wait_ends(self) -> None:
        """What it waited for has come."""
        self._since = None

    def _look(self) -> None:
        warned_since, num_warnings = None, 0
        while not self._ended.wait(min(1.0, self._every_s / 4)):
            since = self._since
            if since is None:
                continue
            if since != warned_since:
                warned_since, num_warnings = since, 0
            waited_s = time.monotonic() - since
            if waited_s >= (num_warnings + 1) * self._every_s:
                num_warnings += 1
                warn = self._warn()
                if warn is not None:
                    warn(waited_s)


def _none() -> None:
    return None


def _as_it_is(reading: Any) -> Any:
    return reading


def _start_worker(worker: int) -> None:
    keep_freed_memory()
    # One thread for each worker: torch's own are limited already, OpenCV's would take every core.
    if "cv2" in sys.modules:
        sys.modules["cv2"].setNumThreads(1)
    threading.Thread(target=_end_with_parent, name="loader-parent", daemon=True).start()


def _end_with_parent() -> None:
    """Workers are children of the fork server, which outlives a killed training process as long as they live."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _shut_down(readings: Any) -> None:
    """End the workers now, rather than when the garbage collector comes to it."""
    readings._shutdown_workers()
