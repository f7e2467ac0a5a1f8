"""In which order clips are visited: a function of seed and epoch alone.

Samples are numbered without end: sample n belongs to epoch n // num_samples. A global batch is the next run of
numbers, cut into one piece per rank, so a batch may begin in one epoch and end in the next: no sample is dropped,
every rank gets equally many, and the same numbers meet in a batch whatever the number of ranks and workers.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

# What a stream of random numbers is for; keeps streams of the same seed and epoch apart.
_CLIPS, _REPLACE, _SAMPLE = range(3)
_MAX_TRIES = 1 << 16


class Visit(NamedTuple):
    """One sample to read: which clip, and which of its samples in this epoch."""

    epoch: int
    clip: int
    draw: int


@dataclass
class Order:
    """The order of `num_clips * samples_per_clip` samples in every epoch.

    Samples of one clip are spread among those of `shuffle_window` clips: the first of each, then the second of each,
    and so on. A batch no larger than a window holds a clip once at most, and if windows are made of whole global
    batches all samples of a clip belong to one rank, which may then read them together.
    """

    num_clips: int
    seed: int
    samples_per_clip: int = 1
    shuffle_window: int = 256
    _epochs: OrderedDict[int, np.ndarray] = field(default_factory=OrderedDict, repr=False)

    @property
    def num_samples(self) -> int:
        """Samples in an epoch."""
        return self.num_clips * self.samples_per_clip

    def visit(self, sample: int) -> Visit:
        """What sample number `sample`, counted over all epochs, is."""
        epoch, position = divmod(sample, self.num_samples)
        clips = self._clips(epoch)
        window, place = divmod(position, self.shuffle_window * self.samples_per_clip)
        first = window * self.shuffle_window
        draw, offset = divmod(place, min(self.shuffle_window, self.num_clips - first))
        return Visit(epoch, int(clips[first + offset]), draw)

    def window(self, sample: int) -> tuple[int, int]:
        """Epoch and window that sample number `sample` belongs to."""
        epoch, position = divmod(sample, self.num_samples)
        return epoch, position // (self.shuffle_window * self.samples_per_clip)

    def replacement(self, sample: int, attempt: int) -> Visit:
        """What to read instead when attempts 0..attempt-1 at a sample gave none (attempt >= 1).

        Attempts walk through all clips in steps that depend on the sample; their draws belong to no other sample.
        """
        epoch, position = divmod(sample, self.num_samples)
        rng = np.random.default_rng([self.seed, _REPLACE, epoch, position])
        start, step = int(rng.integers(self.num_clips)), int(rng.integers(self.num_clips)) + 1
        while math.gcd(step, self.num_clips) > 1:
            step += 1
        draw = self.samples_per_clip + position * _MAX_TRIES + attempt
        return Visit(epoch, (start + attempt * step) % self.num_clips, draw)

    def rng(self, visit: Visit, key: str) -> np.random.Generator:
        """Random numbers for one sample: the same whichever process reads it, and when."""
        return np.random.default_rng([self.seed, _SAMPLE, visit.epoch, visit.draw, int(key, 16)])

    def _clips(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs[epoch] = np.random.default_rng([self.seed, _CLIPS, epoch]).permutation(self.num_clips)
            while len(self._epochs) > 2:  # a batch may lie across a border
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
