"""Keeps the URL of a run up to date with the local folder in which it is trained."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kinema.configs.json_text import json_text
from kinema.pipelines.artifacts.layout import RUN_FILE
from kinema.pipelines.errors import StageError
from kinema.pipelines.train import checkpoint
from kinema.pipelines.train.bucket_run import WHOLE, listed_checkpoints, run_store
from kinema.pipelines.train.meter import MEASURES_FILE, METRICS_FILE

_EVERY_S = 5.0


class RunMirror:
    """Copies a run's folder to its URL from a thread, for as long as the block lasts, and once more at its end.

    Losing the bucket meanwhile is said once and does not stop the training; only what is missing at the end does.
    """

    def __init__(self, url: str, folder: Path, keep: int, best: int = 0, every_s: float = _EVERY_S):
        self.url, self.folder, self.keep, self.best, self.every_s = url, folder, keep, best, every_s
        self._losses: dict[str, float] = {}
        self.store = run_store(url)
        self._sent: dict[str, Any] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="kinema-run-mirror", daemon=True)
        self._lost = False

    def __enter__(self) -> RunMirror:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self.copy()
        except StageError as error:
            if kind is None or kind.__name__ == "Stopped":
                raise StageError(f"{error}; the run is in {self.folder} of this machine, nothing is lost") from None
            sys.stderr.write(f"train: {error}; the run is in {self.folder} of this machine\n")

    def _follow(self) -> None:
        while not self._ended.wait(self.every_s):
            try:
                self.copy()
                self._lost = False
            except StageError as error:
                if not self._lost:
                    sys.stderr.write(f"train: {error}; training goes on, its checkpoints wait in {self.folder}\n")
                self._lost = True

    def copy(self) -> None:
        """Bring the URL up to date: new checkpoints, then their list, then away with the old; small files last."""
        listed = listed_checkpoints(self.store)
        for folder in checkpoint.complete_checkpoints(self.folder):
            if folder.name in listed:
                continue
            try:
                files = {name: (folder / name).stat().st_size for name in sorted(p.name for p in folder.iterdir())}
                for name in files:
                    path = folder / name
                    self.store.put_file(path, f"checkpoints/{folder.name}/{name}", _sha256(path))
            except FileNotFoundError:
                continue  # the training has dropped it meanwhile
            listed[folder.name] = files
            self._list(listed)
        old = checkpoint.to_drop(list(listed), self.keep, self.best, self._losses_of(listed))
        if old:
            dropped = {name: listed.pop(name) for name in old}
            self._list(listed)
            for name, files in dropped.items():
                for file in files:
                    self.store.remove(f"checkpoints/{name}/{file}")
        small = [self.folder / name for name in (RUN_FILE, METRICS_FILE, MEASURES_FILE)]
        for path in (*small, *sorted(self.folder.glob("pictures/*"))):
            if path.is_file() and self._sent.get(path.name) != (state := _state(path)):
                self.store.write(path.relative_to(self.folder).as_posix(), path.read_bytes())
                self._sent[path.name] = state

    def _losses_of(self, listed: Iterable[str]) -> dict[str, float]:
        """Mean losses of the checkpoints in the bucket, by name, if they matter."""
        for name in listed if self.best else ():
            if name not in self._losses:
                meta = json.loads(self.store.read(f"checkpoints/{name}/{checkpoint.META_FILE}"))
                self._losses[name] = checkpoint.mean_loss(meta)
        return self._losses

    def _list(self, listed: dict[str, dict[str, int]]) -> None:
        self.store.write(WHOLE, json_text(listed, indent=2, sort_keys=True).encode())


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
