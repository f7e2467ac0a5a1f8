"""A network's work on a GPU recorded once per shape and repeated as a CUDA graph.

A refinement of twelve steps is some hundred small kernels a step; queued one by one they keep the processor busier
than the GPU. A graph queues them all at once. Nothing here knows a network: what is recorded is any function of
tensors, or of frozen dataclasses that hold tensors, which waits for the device nowhere.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

_KEPT = 4
"""Graphs of one function: each keeps the memory of all that it computes."""
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
    does, the function is called as it is from then on, and stderr says so once.

    Args: function, see the module; its arguments may differ in anything but the values of their tensors, which makes
        another graph; record, how a graph is made.
    """

    def __init__(self, function: Callable[..., Any], record: Record | None = None):
        self._function, self._record = function, record or record_on_gpu
        self._graphs: OrderedDict[Hashable, Recording | None] = OrderedDict()
        self.why_not = ""
        """Why no graph is used any more; empty while they are."""

    def __call__(self, *arguments: Any) -> Any:
        """What the function gives; its tensors belong to the caller."""
        if self.why_not:
            return self._function(*arguments)
        key = _shape(arguments)
        known = key in self._graphs
        recording = self._graphs.get(key)
        if recording is None:
            result = self._function(*arguments)
            # Clips that are alone with their size are not worth a graph.
            self._remember(key, self._checked(arguments, result) if known else None)
            return result
        self._graphs.move_to_end(key)
        return _repeat(recording, arguments)

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
        sys.stderr.write(f"goes on without CUDA graphs: {reason} (teach.cuda_graphs=off never tries)\n")
        sys.stderr.flush()

    def _remember(self, key: Hashable, recording: Recording | None) -> None:
        if self.why_not:
            return
        self._graphs[key] = recording
        self._graphs.move_to_end(key)
        while len(self._graphs) > _KEPT:
            self._graphs.popitem(last=False)


def record_on_gpu(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Recording:
    """The function's kernels on copies of its arguments, as a graph. Raises: RuntimeError where CUDA refuses."""
    copies = tuple(_rebuilt(argument, iter([t.clone() for t in _tensors(argument)])) for argument in arguments)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # whatever is compiled, chosen or allocated once happens before the recording
        for _ in range(2):
            function(*copies)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    # Other threads of an actor (decoding, copies) may call CUDA meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        outputs = function(*copies)
    return Recording(list(_tensors(copies)), outputs, graph.replay)


def _repeat(recording: Recording, arguments: tuple[Any, ...]) -> Any:
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
