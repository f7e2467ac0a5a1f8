"""A network's work on a GPU recorded once per shape and repeated as a CUDA graph.

A refinement of twelve steps is some hundred small kernels a step; queued one by one they keep the processor busier
than the GPU. A graph queues them all at once. Nothing here knows a network: what is recorded is any function of
tensors, or of frozen dataclasses that hold tensors, which waits for the device nowhere and takes nothing from the host
(`geometry.filled` in place of `new_tensor`).

All graphs of a process work in one pool of memory, so that it takes what the largest of them needs, not their sum. One
graph's repetition overwrites what another left there. That is safe because nothing in the pool is read after a
repetition: inputs lie outside, outputs are copied out before the next repetition begins, and repetitions do not
overlap, since a lock lets one thread at a time queue one and a process repeats graphs on one stream.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KEPT = 4
"""Graphs of one function: each keeps its inputs and outputs, and a description of every kernel."""
_SHARE_OFF = 1e-3
"""A repetition may differ from the function by this much of the largest value (other algorithms for a product)."""


class Recording(NamedTuple):
    """What `record` gives: `replay()` computes `outputs` anew from what is in `inputs`."""

    inputs: list[Tensor]
    outputs: Any
    replay: Callable[[], None]


Record = Callable[[Callable[..., Any], tuple[Any, ...]], Recording]


class Graphed:
    """Calls a function; from the second call with the same shapes on, repeats its graph.

    The first repetition of every graph is compared with the function itself. Where recording fails or the comparison
    does, the function is called as it is from then on, and stderr says so once. A call that runs out of the GPU's
    memory while graphs hold some is made once more without any; the first time, stderr says so.

    Args: function, see the module; its arguments may differ in anything but the values of their tensors, which makes
        another graph; record, how a graph is made.
    """

    def __init__(self, function: Callable[..., Any], record: Record | None = None):
        self._function, self._record = function, record or record_on_gpu
        self._graphs: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self.why_not = ""
        """Why no graph is used any more; empty while they are."""
        self._has_said_so = False
        _all.add(self)

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives; its tensors belong to the caller."""
        try:
            return self._called(arguments)
        except torch.OutOfMemoryError:
            if not _forget_graphs():
                raise
        if not self._has_said_so:
            self._has_said_so = True
            _say("the GPU's memory ran out: CUDA graphs were dropped, and are recorded again as calls come")
        # Only here, since the traceback of the handler above keeps the tensors of the call that failed.
        torch.cuda.empty_cache()
        return self._function(*arguments)

    def _called(self, arguments: tuple[Any, ...]) -> Any:
        if self.why_not:
            return self._function(*arguments)
        key = _shape(arguments)
        known = key in self._graphs
        recording = self._graphs.setdefault(key)
        self._graphs.move_to_end(key)
        while len(self._graphs) > _KEPT:  # before the call: what the oldest held is free for it
            self._graphs.popitem(last=False)
        if recording is not None:
            return _repeat(recording, arguments)
        result = self._function(*arguments)
        # Clips that are alone with their size are not worth a graph.
        if known and (recording := self._checked(arguments, result)) is not None:
            self._graphs[key] = recording
        return result

    def _checked(self, arguments: tuple[Any, ...], result: Any) -> Recording | None:
        """A recording whose first repetition gives this result, or None."""
        try:
            recording = self._record(self._function, arguments)
            again = _repeat(recording, arguments)
        except RuntimeError as error:  # of CUDA, memory included: the function itself has just worked
            self._give_up((str(error).strip().splitlines() or [type(error).__name__])[0])
            return None
        for one, other in zip(_tensors(result), _tensors(again), strict=True):
            off = (one.double() - other.double()).abs().max().item() if one.numel() else 0.0
            largest = one.double().abs().max().item() if one.numel() else 0.0
            if not off <= _SHARE_OFF * max(largest, 1e-3):
                self._give_up(f"a repetition was off by {off:.3g} of {largest:.3g}")
                return None
        return recording

    def _give_up(self, reason: str) -> None:
        self.why_not = reason
        self._graphs.clear()
        _say(f"goes on without CUDA graphs: {reason} (teach.cuda_graphs=off never tries)")


def _say(message: str) -> None:
    sys.stderr.write(f"{message}\n")
    sys.stderr.flush()


_all: weakref.WeakSet[Graphed] = weakref.WeakSet()


def _forget_graphs() -> bool:
    """Drop the graphs of all functions, since they share their memory; says whether there were any."""
    found = False
    for graphed in list(_all):
        found = found or any(recording is not None for recording in graphed._graphs.values())
        graphed._graphs.clear()
    return found


class _Pool:
    """Memory that graphs work in, for as long as one of them refers to it.

    PyTorch refuses to record into a pool again once the last graph in it has gone, so the next gets another.
    """

    current: weakref.ref[_Pool] | None = None

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()

    @classmethod
    def of_all(cls) -> _Pool:
        """The pool that there is, or a new one."""
        pool = None if cls.current is None else cls.current()
        if pool is None:
            pool = cls()
            cls.current = weakref.ref(pool)
        return pool


def idle_bytes(device: torch.device) -> int:
    """Bytes of this device that PyTorch counts as reserved and not allocated, and that only graphs may use."""
    pool = None if _Pool.current is None else _Pool.current()
    if pool is None or device.type != "cuda":
        return 0
    segments = torch.cuda.memory_snapshot(pool.handle)
    here = [segment for segment in segments if segment["device"] == device.index]
    return sum(segment["total_size"] - segment["allocated_size"] for segment in here)


def record_on_gpu(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Recording:
    """The function's kernels on copies of its arguments, as a graph. Raises: RuntimeError where CUDA refuses."""
    copies = tuple(_rebuilt(argument, iter([t.clone() for t in _tensors(argument)])) for argument in arguments)
    stream = torch.cuda.current_stream()
    try:
        aside = torch.cuda.Stream()
        aside.wait_stream(stream)
        with torch.cuda.stream(aside):  # whatever is compiled, chosen or allocated once happens before the recording
            for _ in range(2):
                function(*copies)
        stream.wait_stream(aside)
        pool, graph = _Pool.of_all(), torch.cuda.CUDAGraph()
        # Other threads of an actor (decoding, copies) may call CUDA meanwhile.
        with torch.cuda.graph(graph, pool=pool.handle, capture_error_mode="thread_local"):
            outputs = function(*copies)
    except BaseException:
        _Pool.current = None  # a recording that was broken off may hold its pool open
        raise
    finally:
        # torch.cuda.graph leaves its stream only after CUDA has ended the recording without an error.
        torch.cuda.set_stream(stream)
    return Recording(list(_tensors(copies)), outputs, partial(_replay, graph, pool))


def _replay(graph: torch.cuda.CUDAGraph, pool: _Pool) -> None:
    """Queue a graph; refers to its pool, which therefore stays."""
    graph.replay()


_repeating = threading.Lock()


def _repeat(recording: Recording, arguments: tuple[Any, ...]) -> Any:
    with _repeating:
        for place, value in zip(recording.inputs, _tensors(arguments), strict=True):
            place.copy_(value)
        recording.replay()
        return _rebuilt(recording.outputs, iter([tensor.clone() for tensor in _tensors(recording.outputs)]))


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of a value, in the order of fields."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))


def _rebuilt(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The value with other tensors in their places."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_rebuilt(part, tensors) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(_rebuilt(part, tensors) for part in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _rebuilt(getattr(value, f.name), tensors) for f in fields(value)})
    return value


def _shape(value: Any) -> Hashable:
    """All of a value but what is in its tensors."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, tuple | list):
        return tuple(_shape(part) for part in value)
    if is_dataclass(value):
        return type(value), *(_shape(getattr(value, field.name)) for field in fields(value))
    return value
