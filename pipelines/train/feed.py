"""Batches on the training's device; on a GPU the next one is copied while a step computes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kinema.pipelines.train.recipes.protocol import Batch, to_device


class _Copied(NamedTuple):
    """A batch on the device, or on its way there, and where the loader stood behind it."""

    batch: Batch
    position: dict[str, Any]


class Feed:
    """Hands out the loader's batches one by one, on the device, in the loader's order.

    Args: copy_ahead, `train.copy_ahead`: whether `prepare` takes the next batch from the loader and begins to copy
        it, on a stream of its own where the device is a GPU; steps, all batches that will be taken: none is fetched
        beyond.

    `prepare` is called when a step's work has been queued and nobody waits for the device yet. `position` belongs to
    the batch in use, never to one that was fetched ahead: a checkpoint goes on with the next step's samples.
    """

    def __init__(self, loader: Any, device: torch.device, copy_ahead: str, steps: int):
        self.device, self.steps_left = device, steps
        self.ahead = device.type == "cuda" if copy_ahead == "auto" else copy_ahead == "on"
        self.position: dict[str, Any] = loader.state_dict()
        self._loader = loader
        self._batches: Iterator[Batch] = iter(loader)
        self._next: _Copied | None = None
        self._copies = torch.cuda.Stream(device) if self.ahead and device.type == "cuda" else None
        self._wait_s = 0.0

    def take(self) -> tuple[Batch, float]:
        """The next batch, and the seconds that the training waited for it."""
        started = time.perf_counter()
        batch, self.position = self._next or self._fetch()
        self._next = None
        self.steps_left -= 1
        if self._copies is not None:
            _hand_over(batch, self._copies, torch.cuda.current_stream(self.device))
        wait_s, self._wait_s = self._wait_s + time.perf_counter() - started, 0.0
        return batch, wait_s

    def prepare(self) -> None:
        """Fetch the next batch and begin to copy it, unless that was done or nothing is fetched ahead.

        The loader's time counts as waiting unless the device was at work to its end.
        """
        if not self.ahead or self._next is not None or self.steps_left < 1:
            return
        started, queued = time.perf_counter(), _end_of_queue(self.device)
        self._next = self._fetch()
        if queued is None or queued.query():
            self._wait_s += time.perf_counter() - started

    def _fetch(self) -> _Copied:
        batch = next(self._batches)
        with torch.cuda.stream(self._copies):  # of None: no stream is changed
            return _Copied(to_device(batch, self.device), self._loader.state_dict())


def _hand_over(batch: Batch, copies: torch.cuda.Stream, computes: torch.cuda.Stream) -> None:
    """What is computed from now on waits for the copies; their memory is not given away before it has been used."""
    computes.wait_stream(copies)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(computes)


def _end_of_queue(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all that the device was given to do; None on a CPU, which has done it."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None
