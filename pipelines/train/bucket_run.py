"""A run in a bucket, as others read it.

RUN_URL/
    checkpoints.json          names and file sizes of the checkpoints that are whole; written after they are
    checkpoints/step_00000500/...
    run.json, metrics.jsonl, measures.jsonl, pictures/

A checkpoint counts only when checkpoints.json names it and its files have those sizes, so one whose copy was cut is
never picked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

from kinema.pipelines.artifacts.layout import MANIFEST, RUN_FILE
from kinema.pipelines.artifacts.object_store import ObjectStore
from kinema.pipelines.artifacts.store import disk_full_is_clear, open_store
from kinema.pipelines.train.meter import MEASURES_FILE, METRICS_FILE

WHOLE = "checkpoints.json"
_COPY_BYTES = 8 << 20


def is_url(path: str | Path) -> bool:
    """Whether a run is in an object store."""
    return "://" in str(path)


def local_folder(url: str, purpose: str = "run") -> Path:
    """This machine's folder for a run in a bucket."""
    digest = hashlib.blake2b(url.rstrip("/").encode(), digest_size=8).hexdigest()
    return Path(tempfile.gettempdir()) / f"kinema-{purpose}-{digest}"


def run_store(url: str) -> ObjectStore:
    """The store of a run. Raises: ValueError for a local URL, or one with credentials."""
    store = open_store(url)
    if not isinstance(store, ObjectStore):
        raise ValueError(f"{url} is no object store; give a folder, or a URL like s3://bucket/run")
    return store


def listed_checkpoints(store: ObjectStore) -> dict[str, dict[str, int]]:
    """{name: {file: bytes}} of the checkpoints that were copied whole."""
    try:
        return json.loads(store.read(WHOLE))
    except FileNotFoundError:
        return {}


def whole_checkpoints(store: ObjectStore) -> list[str]:
    """Names of the checkpoints that are there with the sizes they should have, oldest first."""
    listed = sorted(listed_checkpoints(store).items())
    return [name for name, files in listed if store.sizes(f"checkpoints/{name}") == files]


def fetch_run(url: str, folder: Path, newest_here: str = "") -> None:
    """Bring what is newer in the bucket to the folder: the newest whole checkpoint, run.json, metrics.

    A folder whose run is not in the bucket (any more) is emptied: the bucket decides.
    Args: newest_here, name of the folder's newest checkpoint.
    Raises: ValueError for an artifact at the URL; StageError when the store does not answer.
    """
    store = run_store(url)
    try:
        record = store.read(RUN_FILE)
    except FileNotFoundError:
        shutil.rmtree(folder, ignore_errors=True)
        if MANIFEST in store.sizes():
            raise ValueError(f"{url} holds an artifact; choose another URL for the run") from None
        return
    newest = next(iter(reversed(whole_checkpoints(store))), "")
    if newest_here and newest <= newest_here:
        return
    folder.mkdir(parents=True, exist_ok=True)
    if newest:
        fetch_checkpoint(store, newest, folder)
    for name in {METRICS_FILE, MEASURES_FILE} & set(store.sizes()):
        (folder / name).write_bytes(store.read(name))
    (folder / RUN_FILE).write_bytes(record)


def fetch_checkpoint(store: ObjectStore, name: str, folder: Path) -> Path:
    """Copy one checkpoint to the folder, whole or not at all; one that is there stays."""
    final = folder / "checkpoints" / name
    if final.is_dir():
        return final
    temporary = Path(tempfile.mkdtemp(prefix=".partial-", dir=_made(final.parent)))
    for file in listed_checkpoints(store)[name]:
        with store.open(f"checkpoints/{name}/{file}") as source, (temporary / file).open("wb") as target:
            with disk_full_is_clear(str(final)):
                shutil.copyfileobj(source, target, _COPY_BYTES)
    try:
        temporary.rename(final)
    except OSError:  # another process was quicker
        shutil.rmtree(temporary)
    return final


def fetched_checkpoint(url: str, setting: str = "model") -> Path:
    """A local copy of the checkpoint meant by the URL of a run (its newest) or of one of its checkpoints.

    Raises: ValueError if there is none.
    """
    run, _, name = url.rstrip("/").partition("/checkpoints/")
    store, folder = run_store(run), local_folder(run, "fetched")
    whole = whole_checkpoints(store)
    if not whole or (name and name not in whole):
        raise ValueError(f"{setting}={url} holds no complete checkpoint; give the URL that `kinema train` wrote to")
    final = fetch_checkpoint(store, name or whole[-1], folder)
    if RUN_FILE in store.sizes():
        (folder / RUN_FILE).write_bytes(store.read(RUN_FILE))
    return final


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
