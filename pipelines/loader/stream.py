"""`loader.mode=stream`: shards are fetched whole, in an order that follows from seed and epoch, a few ahead of use.

Storage that answers slowly but sends fast (buckets) wants few large reads. The order of samples is still a function
of their number alone, so positions, resume and independence of the number of workers are those of random mode; what
changes is that neighbours in the order lie in the same shards, which wait in a folder when their turn comes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import secrets
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from kinema.pipelines.artifacts.store import is_local, open_store
from kinema.pipelines.artifacts.temporary import disk_full_is_clear
from kinema.pipelines.errors import StageError
from kinema.pipelines.loader.order import Order, Visit

_SHARDS, _MIX, _NEAR = range(3, 6)  # streams of random numbers beside those of Order
_NEAR_TRIES = 64
_CLIPS_AHEAD = 8192
_PIECE_BYTES = 8 << 20
_IN_USE_S = 5.0


@dataclass
class StreamOrder(Order):
    """Clips shard by shard, mixed within `shuffle_window` clips, in as many lanes as batches are cut into.

    A lane is a run of the epoch's sequence that fills the same share of every global batch, so that ranks which read
    different lanes need different shards. Every sample still comes once in an epoch.

    Args: shards, the shard of each clip; lanes; global_batch, a multiple of them.
    """

    shards: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    lanes: int = 1
    global_batch: int = 1

    def visit(self, sample: int) -> Visit:
        """What sample number `sample`, counted over all epochs, is."""
        epoch, position = divmod(sample, self.num_samples)
        return self._at(epoch, self._in_sequence(epoch, position))

    def window(self, sample: int) -> tuple[int, int]:
        """Epoch and window that sample number `sample` belongs to."""
        epoch, position = divmod(sample, self.num_samples)
        return epoch, self._in_sequence(epoch, position) // (self.shuffle_window * self.samples_per_clip)

    def replacement(self, sample: int, attempt: int) -> Visit:
        """Clips of the same window first, whose shards are at hand; if all of them give nothing, any clip."""
        if attempt > _NEAR_TRIES:
            return super().replacement(sample, attempt)
        epoch, position = divmod(sample, self.num_samples)
        place = self._in_sequence(epoch, position)
        first = place // (self.shuffle_window * self.samples_per_clip) * self.shuffle_window
        size = min(self.shuffle_window, self.num_clips - first)
        start = int(np.random.default_rng([self.seed, _NEAR, epoch, position]).integers(size))
        draw = super().replacement(sample, attempt).draw
        return Visit(epoch, int(self._clips(epoch)[first + (start + attempt) % size]), draw)

    def shards_ahead(self, sample: int, slots: range, count: int) -> list[int]:
        """Shards that the slots of the global batches from sample number `sample` on need: the next `count` of each
        lane, those now in use first."""
        width = self.global_batch // self.lanes
        found: dict[int, None] = {}
        for lane in range(slots.start // width, (slots.stop - 1) // width + 1):
            slot = max(slots.start, lane * width)
            number = sample - sample % self.global_batch + slot
            epoch, position = divmod(number, self.num_samples)
            place = self._in_sequence(epoch, position) // self.samples_per_clip
            first = place // self.shuffle_window * self.shuffle_window
            clips = self._clips(epoch)[first : first + _CLIPS_AHEAD + self.shuffle_window]
            window = dict.fromkeys(self.shards[clips[: self.shuffle_window]].tolist())
            later = [s for s in dict.fromkeys(self.shards[clips].tolist()) if s not in window]
            if len(later) < count:  # the epoch ends: the next one begins elsewhere
                following = self._clips(epoch + 1)[: self.shuffle_window]
                later += dict.fromkeys(self.shards[following].tolist())
            found |= window | dict.fromkeys(later[:count])
        return list(found)

    def _at(self, epoch: int, place: int) -> Visit:
        window, inside = divmod(place, self.shuffle_window * self.samples_per_clip)
        first = window * self.shuffle_window
        draw, offset = divmod(inside, min(self.shuffle_window, self.num_clips - first))
        return Visit(epoch, int(self._clips(epoch)[first + offset]), draw)

    def _in_sequence(self, epoch: int, position: int) -> int:
        """Place in the epoch's sequence of the sample at `position` of the epoch."""
        if self.lanes == 1:
            return position
        start = epoch * self.num_samples
        lane = (start + position) % self.global_batch // (self.global_batch // self.lanes)
        before = sum(self._count(other, start + self.num_samples) - self._count(other, start) for other in range(lane))
        return before + self._count(lane, start + position) - self._count(lane, start)

    def _count(self, lane: int, number: int) -> int:
        """Samples of a lane among those numbered below `number`."""
        width = self.global_batch // self.lanes
        whole, rest = divmod(number, self.global_batch)
        return whole * width + min(max(rest - lane * width, 0), width)

    def _clips(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs[epoch] = self._sequence(epoch)
            while len(self._epochs) > 2:  # a batch may lie across a border
                self._epochs.popitem(last=False)
        return self._epochs[epoch]

    def _sequence(self, epoch: int) -> np.ndarray:
        numbers = np.unique(self.shards)
        rank = np.empty(len(numbers), np.int64)
        rank[np.random.default_rng([self.seed, _SHARDS, epoch]).permutation(len(numbers))] = np.arange(len(numbers))
        clips = np.argsort(rank[np.searchsorted(numbers, self.shards)], kind="stable")
        rng = np.random.default_rng([self.seed, _MIX, epoch])
        for first in range(0, len(clips), self.shuffle_window):
            rng.shuffle(clips[first : first + self.shuffle_window])
        return clips


class ShardCache:
    """Whole shards of object stores as local files, fetched once for all processes that share the folder.

    The oldest unused ones go when the files exceed `limit_bytes`. Picklable; each process fetches in two threads.
    Local shards are used where they are.
    """

    def __init__(self, folder: str | Path, limit_bytes: int):
        self.folder, self.limit_bytes = Path(folder), limit_bytes
        self._reset()

    def _reset(self) -> None:
        self._asked: set[str] = set()
        self._said = False
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "limit_bytes": self.limit_bytes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def prefetch(self, urls: Sequence[str]) -> None:
        """Begin to fetch, in this order, what is not there; returns at once. Failures show when a shard is read."""
        for url in urls:
            with self._lock:
                if is_local(url) or url in self._asked:
                    continue
                self._asked.add(url)
                if self._pool is None:
                    self._pool = ThreadPoolExecutor(2, thread_name_prefix="kinema-shards")
            self._pool.submit(self._fetch_ahead, url)

    def _fetch_ahead(self, url: str) -> None:
        with suppress(StageError, ValueError, OSError):
            self.local(url)
        with self._lock:
            self._asked.discard(url)

    def local(self, url: str) -> str:
        """Path of the shard's file, fetched if need be.

        Raises: ValueError when it does not exist; StageError when the store does not answer, or the shard is larger
            than the limit.
        """
        if is_local(url):
            return url
        path = self.folder / f"{hashlib.blake2b(url.encode(), digest_size=16).hexdigest()}.tar"
        with suppress(FileNotFoundError):
            os.utime(path)  # what is used stays
            return str(path)
        self.folder.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # another process may be fetching it
            if not path.exists():
                self._fetch(url, path)
        return str(path)

    def _fetch(self, url: str, path: Path) -> None:
        parent, _, name = url.rpartition("/")
        try:
            with open_store(parent).open(name) as source:
                size = source.seek(0, os.SEEK_END)
                source.seek(0)
                if size > self.limit_bytes:
                    raise StageError(
                        f"{url} has {size / 1e9:.1f} GB, more than loader.cache_gb={self.limit_bytes / 1e9:g}; set it "
                        "to some shards or more, or use loader.mode=random"
                    )
                self._make_room(size)
                temporary = path.with_name(f"{path.stem}-{secrets.token_hex(4)}.partial")
                try:
                    with disk_full_is_clear(str(path), size), temporary.open("xb") as file:
                        while piece := source.read(_PIECE_BYTES):
                            file.write(piece)
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
        except FileNotFoundError:
            raise ValueError(f"{url} does not exist; run `kinema verify` on its artifact") from None

    def _make_room(self, size: int) -> None:
        """Remove the files that were used longest ago; processes that are reading one keep it open."""
        files: list[tuple[int, int, Path]] = []
        for path in self.folder.glob("*.tar"):
            with suppress(FileNotFoundError):
                found = path.stat()
                files.append((found.st_mtime_ns, found.st_size, path))
        total = sum(each for _, each, _ in files)
        for used_ns, each, path in sorted(files):
            if total + size <= self.limit_bytes:
                return
            if time.time() - used_ns / 1e9 < _IN_USE_S and not self._said:
                self._said = True
                sys.stderr.write(
                    f"loader: loader.cache_gb={self.limit_bytes / 1e9:g} is less than the shards in use need, so they "
                    "are fetched again and again; set it higher, or loader.shuffle_window or loader.lookahead lower\n"
                )
            path.unlink(missing_ok=True)
            total -= each
