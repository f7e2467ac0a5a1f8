"""Ray at the edge: connect, bounded tasks, a pool of actors; failures come back as data.

`run_tasks` and `run_on_actors` have a second backend that runs in this process (`KINEMA_ENGINE=serial`), so that a
stage's logic, which is plain functions and classes, is tested and debugged without Ray.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from kinema.pipelines.errors import StageError, one_line
from kinema.pipelines.ray_start import connect

Item = TypeVar("Item")
Value = TypeVar("Value")
Backend = Literal["ray", "serial"]

_MAX_FAILED_STARTS = 3
_MAX_NODES_LOST = 8  # by one item, which then may be what takes them down
_NODE_LOST = "NodeLost"
_TICK_S = 1.0
_NODE_WAIT_VARIABLE, _NODE_WAIT_S = "KINEMA_NODE_WAIT_S", 600.0
_SETTLED_S = 0.1  # within which the answer of a task that has just ended is dealt with
_END_S = 0.3  # killed processes hold what they were writing until they are gone, about 0.1 s later
_END_WAIT_S = 30.0  # on a machine with ten times more work than cores it takes them seconds to die
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Result(Generic[Value]):
    """What the work returned, and at which attempt."""

    value: Value
    attempts: int = 1


@dataclass(frozen=True)
class Failure:
    """Why an item has no result.

    `kind`: `error` (the work raised), `crash` (its process died: killed, segmentation fault, out of memory) or
    `timeout`. `error_class` and `message` say more; `where` is the line that raised.
    """

    kind: Literal["error", "crash", "timeout"]
    error_class: str
    message: str
    attempts: int = 1
    where: str = ""


def backend(choice: str | None = None) -> Backend:
    """`choice`, else KINEMA_ENGINE, else `ray`. Raises: ValueError for another name."""
    name = choice or os.environ.get("KINEMA_ENGINE") or "ray"
    if name == "ray":
        return "ray"
    if name == "serial":
        return "serial"
    raise ValueError(f"KINEMA_ENGINE={name} is not an engine; use ray or serial")


def resources(
    engine: str | None = None, *, num_cpus: float = 1.0, num_gpus: float = 0.0, count: int = 1
) -> dict[str, float]:
    """What there is to work with: of the cluster, or of this machine for the serial backend.

    A cluster that was joined is given time to grow until `count` tasks fit that need so much.
    """
    if backend(engine) == "ray":
        return _with_a_place(num_cpus, num_gpus, count)
    import psutil
    import torch

    memory = float(psutil.virtual_memory().available)
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count()), "memory": memory}


def num_nodes() -> int:
    """Nodes of the cluster that are alive."""
    return len(resources_of_nodes("ray"))


def resources_of_nodes(engine: str | None = None) -> list[dict[str, float]]:
    """What each node has that is alive; this machine is the only one of the serial backend."""
    if backend(engine) == "serial":
        return [resources("serial")]
    connect()
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class Counter:
    """Numbers that workers add to and the driver reads, for progress. Travels to workers."""

    def __init__(self, size: int = 2, engine: str | None = None):
        self._local = _Tally(size)
        self._told = False
        self._remote: Any = None
        if backend(engine) == "ray":
            connect()
            import ray
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            # Beside the driver: any other node may be lost.
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._remote = ray.remote(_Tally).options(num_cpus=0, scheduling_strategy=here).remote(size)

    def add(self, *amounts: int) -> None:
        """Add one amount to each number; does not wait."""
        if self._remote is None:
            self._local.add(*amounts)
        else:
            self._remote.add.remote(*amounts)

    def read(self) -> list[int]:
        """The sums so far; those of the last time where the count does not answer: no work fails for its progress."""
        if self._remote is None:
            return self._local.read()
        import ray

        try:
            self._local.sums = ray.get(self._remote.read.remote(), timeout=_TICK_S)
        except ray.exceptions.RayError:
            if not self._told:
                _log.warning("the count of what is done does not answer: progress is shown as it was last known")
            self._told = True
        return self._local.read()


class _Tally:
    def __init__(self, size: int):
        self.sums = [0] * size

    def add(self, *amounts: int) -> None:
        self.sums = [total + amount for total, amount in zip(self.sums, amounts, strict=True)]

    def read(self) -> list[int]:
        return self.sums


def run_tasks(
    fn: Callable[[Item], Value],
    items: Iterable[Item],
    *,
    max_in_flight: int = 0,
    retries: int = 2,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    timeout_s: float | None = None,
    on_tick: Callable[[], None] | None = None,
    engine: str | None = None,
) -> Iterator[tuple[Item, Result[Value] | Failure]]:
    """`fn(item)` for every item, in order of completion, with at most `max_in_flight` submitted (0: two per slot, as
    many as there are at the moment: what waits for a place is what an autoscaler starts nodes for).

    A task whose process dies or takes longer than `timeout_s` is tried again `retries` times; one that raises is
    not, since the same input raises again. Leaving the iterator stops what is running. `on_tick` is called about
    every second while waiting (the serial backend: after every item).
    Raises: StageError when a task raised one (a full disk concerns the run, not the item).
    """
    if backend(engine) == "serial":
        yield from _serial(fn, items, on_tick)
        return
    queue = deque(_Try(item) for item in items)
    if not queue:
        return
    limit = max_in_flight or 2 * _slots(_with_a_place(num_cpus, num_gpus), num_cpus, num_gpus)
    import ray

    remote = ray.remote(_guarded).options(
        num_cpus=num_cpus, num_gpus=num_gpus, max_retries=0, retry_exceptions=False, scheduling_strategy="SPREAD"
    )
    running: dict[Any, tuple[_Try, float]] = {}
    try:
        while queue or running:
            while queue and len(running) < limit:
                one = queue.popleft()
                running[remote.remote(fn, one.item, timeout_s)] = (one, time.monotonic())
            ready, _ = ray.wait(list(running), num_returns=1, timeout=_TICK_S)
            if on_tick:
                on_tick()
            if not ready:
                continue
            limit = max_in_flight or max(limit, 2 * _slots(connect(), num_cpus, num_gpus, or_fail=False))
            one, started = running.pop(ready[0])
            outcome = _collect(ready[0], one.attempt, started, timeout_s)
            again = one.after(outcome, retries)
            if again is not None:
                queue.appendleft(again)
                continue
            yield one.item, outcome
    finally:
        # A signal is seen when something is ready: what has just ended is left alone, since cancelling it may end this
        # process (Ray takes the answer of a task that it has cancelled for an error of its own).
        pending = ray.wait(list(running), num_returns=len(running), timeout=_SETTLED_S)[1] if running else []
        for reference in pending:
            ray.cancel(reference, force=True)
        _wait_for_the_end(pending)


def run_on_actors(
    make: Callable[[], Callable[[Item], Value]],
    items: Iterable[Item],
    *,
    num_actors: int,
    retries: int = 2,
    num_cpus: float = 1.0,
    num_gpus: float = 0.0,
    timeout_s: float | None = None,
    on_tick: Callable[[], None] | None = None,
    engine: str | None = None,
) -> Iterator[tuple[Item, Result[Value] | Failure]]:
    """Like run_tasks on `num_actors` long-lived workers, each of which calls `make()` once (weights) and then the
    result for item after item.

    An actor that dies is replaced and its item tried again `retries` times. The value of an item must not depend on
    which actor computes it.
    Raises: what `make()` raised, if ValueError or StageError; StageError when actors cannot be started.
    """
    queue = deque(_Try(item) for item in items)
    if not queue:
        return
    if backend(engine) == "serial":
        yield from _serial(make(), (one.item for one in queue), on_tick)
        return
    fitting = _slots(_with_a_place(num_cpus, num_gpus), num_cpus, num_gpus)
    if _has_joined():
        fitting = num_actors  # those without a place wait, and an autoscaler starts nodes for them
    pool = _ActorPool(make, num_cpus=num_cpus, num_gpus=num_gpus, timeout_s=timeout_s)
    try:
        for _ in range(max(1, min(num_actors, fitting, len(queue)))):
            pool.start()
        while queue or pool.num_busy:
            pool.feed(queue)
            if on_tick:
                on_tick()
            for one, outcome in pool.wait():
                again = one.after(outcome, retries)
                if again is not None:
                    queue.appendleft(again)
                else:
                    yield one.item, outcome
    finally:
        pool.close()


@dataclass(frozen=True)
class _Try:
    """An item on its way, and how often it has been tried."""

    item: Any
    attempt: int = 1
    nodes_lost: int = 0

    def after(self, outcome: Result | Failure, retries: int) -> _Try | None:
        """The next try; None when this outcome is the last. Losing a node is not held against the item."""
        if isinstance(outcome, Result) or outcome.kind == "error":
            return None
        if outcome.error_class == _NODE_LOST and self.nodes_lost < _MAX_NODES_LOST:
            return replace(self, nodes_lost=self.nodes_lost + 1)
        return replace(self, attempt=self.attempt + 1) if self.attempt <= retries else None


class _ActorPool:
    """Actors, one item in flight on each."""

    def __init__(self, make: Callable, *, num_cpus: float, num_gpus: float, timeout_s: float | None):
        import ray

        self.ray = ray
        self.remote = ray.remote(_Host).options(num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0)
        self.make, self.timeout_s = make, timeout_s
        self.starting: dict[Any, Any] = {}
        self.idle: list[Any] = []
        self.busy: dict[Any, tuple[Any, _Try, float]] = {}
        self.failed_starts = 0

    @property
    def num_busy(self) -> int:
        return len(self.busy)

    def start(self) -> None:
        host: Any = self.remote.remote(self.make)
        self.starting[host.start.remote()] = host

    def feed(self, queue: deque) -> None:
        while queue and self.idle:
            host = self.idle.pop()
            one = queue.popleft()
            reference = host.call.remote(one.item, self.timeout_s)
            self.busy[reference] = (host, one, time.monotonic())

    def wait(self) -> list[tuple[_Try, Result | Failure]]:
        """Wait a while for one actor to start or to finish; returns the finished item, or nothing."""
        ready, _ = self.ray.wait([*self.starting, *self.busy], num_returns=1, timeout=_TICK_S)
        if not ready:
            return []
        if ready[0] in self.starting:
            self._started(ready[0])
            return []
        host, one, started = self.busy.pop(ready[0])
        outcome = _collect(ready[0], one.attempt, started, self.timeout_s)
        if isinstance(outcome, Failure) and outcome.kind != "error":
            self.ray.kill(host)
            self.start()
        else:
            self.idle.append(host)
        return [(one, outcome)]

    def _started(self, reference: Any) -> None:
        host = self.starting.pop(reference)
        outcome = _collect(reference, 1, time.monotonic(), None)
        if isinstance(outcome, Result):
            self.failed_starts = 0
            self.idle.append(host)
            return
        self.ray.kill(host)
        if outcome.kind == "error":
            wrong = outcome.error_class == "ValueError"
            raise ValueError(outcome.message) if wrong else StageError(_describe(outcome))
        self.failed_starts += outcome.error_class != _NODE_LOST
        if self.failed_starts >= _MAX_FAILED_STARTS:
            raise StageError(f"workers die while they start, {self.failed_starts} times: {outcome.message}")
        self.start()

    def close(self) -> None:
        for host in [*self.starting.values(), *self.idle, *(entry[0] for entry in self.busy.values())]:
            self.ray.kill(host)
        _wait_for_the_end(list(self.busy))


def _wait_for_the_end(references: list[Any]) -> None:
    """Of work that was killed: until then its process may hold, and finish, what it is writing."""
    import ray

    if references:
        ray.wait(references, num_returns=len(references), timeout=_END_WAIT_S)
        time.sleep(_END_S)


class _Host:
    """The Ray actor around a plain callable."""

    def __init__(self, make: Callable[[], Callable]):
        self.make = make

    def start(self) -> tuple:
        """Build the callable; the outcome is data like that of a call."""
        return _guarded(self._build, None, None)

    def _build(self, _: None) -> None:
        self.work = self.make()

    def call(self, item: Any, timeout_s: float | None) -> tuple:
        """One item."""
        return _guarded(self.work, item, timeout_s)


def _guarded(fn: Callable[[Any], Any], item: Any, timeout_s: float | None) -> tuple:
    """Run in the worker: ("value", v), or ("error", class, message, where), or ("stage", message)."""
    try:
        with _watchdog(timeout_s):
            return "value", fn(item)
    except StageError as error:
        return "stage", str(error)
    except Exception as error:  # noqa: BLE001  failures become data; the caller decides
        level = logging.WARNING if os.environ.get("KINEMA_DEBUG") == "1" else logging.DEBUG
        _log.log(level, "work failed", exc_info=True)
        return "error", type(error).__name__, one_line(error), _where(error)


@contextmanager
def _watchdog(timeout_s: float | None) -> Iterator[None]:
    """End this worker process when the block takes too long, even if native code holds the interpreter."""
    if timeout_s is None:
        yield
        return
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(timeout_s, exit=True, file=nowhere)
        try:
            yield
        finally:
            faulthandler.cancel_dump_traceback_later()


def _collect(reference: Any, attempt: int, started: float, timeout_s: float | None) -> Result | Failure:
    """The outcome behind a finished reference. Raises: StageError when the work did."""
    import ray
    from ray import exceptions

    try:
        outcome = ray.get(reference)
    except exceptions.OutOfMemoryError:
        message = "its process was stopped for using too much memory; use fewer workers"
        return Failure("crash", "OutOfMemory", message, attempt)
    except exceptions.RayTaskError as error:  # before or after the work: arguments or the value do not travel
        cause = error.cause if isinstance(error.cause, Exception) else error
        return Failure("error", type(cause).__name__, one_line(cause), attempt)
    except exceptions.RayError as error:
        elapsed_s = time.monotonic() - started
        if timeout_s is not None and elapsed_s >= timeout_s:
            return Failure("timeout", "Timeout", f"took longer than {timeout_s:g} s", attempt)
        if isinstance(error, exceptions.RuntimeEnvSetupError | exceptions.TaskUnschedulableError):
            raise StageError(f"workers cannot start: {one_line(error)}") from None
        if isinstance(error, exceptions.NodeDiedError) or "node has died" in str(error):
            return Failure("crash", _NODE_LOST, "its node was lost", attempt)
        reason = "its process died (killed, crashed or lost its node)"
        if "creation task" in str(error):  # the actor's code does not load there
            reason = [line.strip() for line in str(error).splitlines() if line.strip()][-1][:500]
        return Failure("crash", "WorkerCrashed", reason, attempt)
    if outcome[0] == "stage":
        raise StageError(outcome[1])
    if outcome[0] == "error":
        return Failure("error", outcome[1], outcome[2], attempt, outcome[3])
    return Result(outcome[1], attempt)


def _serial(
    fn: Callable[[Item], Value], items: Iterable[Item], on_tick: Callable[[], None] | None
) -> Iterator[tuple[Item, Result | Failure]]:
    for item in items:
        outcome = _guarded(fn, item, None)
        if outcome[0] == "stage":
            raise StageError(outcome[1])
        if on_tick:
            on_tick()
        yield (
            item,
            Result(outcome[1]) if outcome[0] == "value" else Failure("error", outcome[1], outcome[2], 1, outcome[3]),
        )


def _has_joined() -> bool:
    """Whether the cluster is somebody else's, and may grow."""
    return os.environ.get("RAY_ADDRESS", "local") not in ("", "local")


def _with_a_place(num_cpus: float, num_gpus: float, count: int = 1) -> dict[str, float]:
    """The cluster's resources, as soon as so many such tasks fit; one that was joined is asked for nodes.

    An autoscaler may have no worker running, and nodes that were just started need their time.
    """
    found = connect()
    one = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount}
    wanted = {name: amount * count for name, amount in one.items()}
    if not _has_joined() or _fits(found, wanted):
        return found
    from ray.autoscaler.sdk import request_resources

    _log_line(f"engine: waiting for nodes with {', '.join(f'{amount:g} {name}' for name, amount in wanted.items())}")
    deadline = time.monotonic() + float(os.environ.get(_NODE_WAIT_VARIABLE, _NODE_WAIT_S))
    request_resources(bundles=[one] * count)
    while not _fits(found, wanted) and time.monotonic() < deadline:
        time.sleep(_TICK_S)
        found = connect()
    request_resources(bundles=[])
    return found


def _fits(found: dict[str, float], wanted: dict[str, float]) -> bool:
    return all(found.get(name, 0.0) >= amount for name, amount in wanted.items())


def _log_line(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def _slots(resources: dict[str, float], num_cpus: float, num_gpus: float, or_fail: bool = True) -> int:
    """How many such tasks run at once. Raises: StageError when not even one fits, unless `or_fail` is off."""
    slots = []
    for name, needed in (("CPU", num_cpus), ("GPU", num_gpus)):
        if needed:
            available = resources.get(name, 0.0)
            if available < needed and or_fail:
                raise StageError(f"a task needs {needed:g} {name}, the cluster has {available:g}")
            slots.append(int(available // needed))
    return max(1, min(slots, default=1))


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _describe(failure: Failure) -> str:
    return f"{failure.error_class}: {failure.message}" + (f" ({failure.where})" if failure.where else "")
