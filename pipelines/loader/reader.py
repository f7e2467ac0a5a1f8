"""From sample numbers to batches: read, replace what is skipped or damaged, stack. Runs in loader workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kinema.pipelines.errors import StageError
from kinema.pipelines.loader.clip import Clip, DamagedClip
from kinema.pipelines.loader.index import ClipIndex
from kinema.pipelines.loader.order import Order, Visit
from kinema.pipelines.loader.stream import StreamOrder

Sample = Mapping[str, Any]
Batch = dict[str, Any]

# Tries that fail in a row before the data counts as unusable; each goes to another clip, or another draw of it.
MAX_FAILED_TRIES = 256


@dataclass(frozen=True)
class Skip:
    """What `read_sample` returns instead of a sample that cannot be learned from; counted by reason."""

    reason: str


ReadSample = Callable[[Clip, np.random.Generator], Sample | Skip]
ReadSamples = Callable[[Clip, Sequence[np.random.Generator]], Sequence[Sample | Skip]]
"""Several samples of one clip at once, one for each generator: each as if it were read alone."""


@dataclass
class Account:
    """What reading a batch has cost and met."""

    bytes_read: int = 0
    frames_decoded: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    damaged: dict[str, str] = field(default_factory=dict)
    """Message by key of damaged clips."""


@dataclass
class Reading:
    """What a worker hands over: consecutive batches, or why there are none."""

    batches: list[Batch]
    account: Account
    failure: str | None = None

    def pin_memory(self) -> Reading:
        """Tensors moved to page-locked memory; the torch loader's pinning thread calls this."""
        pinned = [
            {name: v.pin_memory() if isinstance(v, Tensor) else v for name, v in batch.items()}
            for batch in self.batches
        ]
        return Reading(pinned, self.account, self.failure)


class BatchReader(Dataset[Reading]):
    """Reads batches by their samples' numbers; a torch data set whose items are one or several whole batches.

    With `read_samples`, samples of one item that come from the same clip are read together.
    """

    def __init__(
        self,
        index: ClipIndex,
        read_sample: ReadSample,
        order: Order,
        read_samples: ReadSamples | None = None,
        lookahead: int = 0,
    ):
        self.index, self.read_sample, self.order, self.read_samples = index, read_sample, order, read_samples
        self.lookahead = lookahead

    def __getitem__(self, job: Sequence[Sequence[int]]) -> Reading:
        account = Account()
        self._prefetch(job)
        counter = self.index.counter
        bytes_before, frames_before = counter.bytes_read, counter.frames_decoded
        batches = []
        try:
            first_tries = self._read_together(job, account) if self.read_samples else {}
            for samples in job:
                read = [self._read(sample, account, first_tries.pop(sample, None)) for sample in samples]
                batches.append(stack([sample for _, sample in read], [key for key, _ in read]))
        except StageError as error:
            # Handed over as text: raised here, it would reach the training process inside a traceback.
            return Reading([], account, str(error))
        account.bytes_read = counter.bytes_read - bytes_before
        account.frames_decoded = counter.frames_decoded - frames_before
        return Reading(batches, account)

    def _prefetch(self, job: Sequence[Sequence[int]]) -> None:
        """In stream mode, shards that this rank needs now and next are on their way before they are read."""
        if self.index.shards is None or not isinstance(self.order, StreamOrder):
            return
        first = job[0][0]
        slots = range(first % self.order.global_batch, first % self.order.global_batch + len(job[0]))
        for shard in self.order.shards_ahead(first, slots, self.lookahead):
            self.index.shards.prefetch(self.index.urls_of(shard))

    def _read_together(self, job: Sequence[Sequence[int]], account: Account) -> dict[int, Sample | Skip]:
        """The first try of every sample of the job, by number; each clip is opened once."""
        assert self.read_samples is not None
        by_clip: dict[int, list[int]] = {}
        for sample in (number for samples in job for number in samples):
            by_clip.setdefault(self.order.visit(sample).clip, []).append(sample)
        found: dict[int, Sample | Skip] = {}
        for number, samples in by_clip.items():
            clip = self.index.clip(number)
            rngs = [self.order.rng(self.order.visit(sample), clip.key) for sample in samples]
            try:
                found |= zip(samples, self.read_samples(clip, rngs), strict=True)
            except DamagedClip as error:
                account.damaged[clip.key] = str(error)
                found |= dict.fromkeys(samples, Skip("damaged"))
        return found

    def _read(self, sample: int, account: Account, found: Sample | Skip | None) -> tuple[str, Sample]:
        """Key and content of a sample, or of the first of its replacements that can be read.

        Args: found, what the first try gave, if it was made.
        """
        reasons: Counter[str] = Counter()
        visit = self.order.visit(sample)
        for attempt in range(1, MAX_FAILED_TRIES + 1):
            clip = self.index.clip(visit.clip)
            if found is None:
                found = self._try(visit, account)
            if not isinstance(found, Skip):
                account.skipped += reasons
                return clip.key, found
            reasons[found.reason] += 1
            visit, found = self.order.replacement(sample, attempt), None
        account.skipped += reasons
        listed = ", ".join(f"{number} x {reason}" for reason, number in reasons.most_common())
        raise StageError(
            f"no usable sample in {self.index.clips_url}: {MAX_FAILED_TRIES} tries in a row over "
            f"{len(self.index)} clips gave none ({listed})" + _example(account)
        )

    def _try(self, visit: Visit, account: Account) -> Sample | Skip:
        clip = self.index.clip(visit.clip)
        rng = self.order.rng(visit, clip.key)
        try:
            return self.read_sample(self.index.drawn(visit.clip, rng), rng)
        except DamagedClip as error:
            account.damaged[clip.key] = str(error)
            return Skip("damaged")


def _example(account: Account) -> str:
    return f"; for example {next(iter(account.damaged.values()))}" if account.damaged else ""


def stack(samples: Sequence[Sample], keys: Sequence[str]) -> Batch:
    """One batch of samples with equal names: tensors and arrays stacked, numbers as a tensor, strings as a list.

    Raises: ValueError when samples disagree in names or shapes, or one is named `key`, which holds the clips' keys.
    """
    names = list(samples[0])
    if "key" in names:
        raise ValueError("a sample must not hold `key`: the loader puts the clips' keys there")
    batch: Batch = {}
    for name in names:
        values = [sample[name] for sample in samples if name in sample]
        if len(values) != len(samples) or any(len(sample) != len(names) for sample in samples):
            raise ValueError(f"samples of one batch hold different names; {names} in the first")
        batch[name] = _stacked(name, values)
    batch["key"] = list(keys)
    return batch


def _stacked(name: str, values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, str):
        return values
    if isinstance(first, np.ndarray):
        values = [torch.from_numpy(np.ascontiguousarray(value)) for value in values]
        first = values[0]
    if isinstance(first, Tensor):
        shapes = {tuple(value.shape) for value in values}
        if len(shapes) > 1:
            raise ValueError(f"samples of one batch have different shapes of `{name}`: {sorted(shapes)}")
        return torch.stack(values)
    if isinstance(first, float | np.floating):
        return torch.tensor(values, dtype=torch.float32)
    return torch.tensor(values)
