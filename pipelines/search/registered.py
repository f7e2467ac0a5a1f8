"""An index in MLflow: files of a run of its own, named by a tag of the model version whose embeddings it holds.

A version may have several, one for each features artifact: the tag's name ends with the artifact's plan8.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kinema.pipelines import tracking
from kinema.pipelines.registry.versions import Registry, version_of_content
from kinema.pipelines.search.approximate import INDEX_FILES
from kinema.pipelines.search.windows import MotionWindows

TAG = "kinema.search_index."
FOLDER = "search_index"


def registered_model(windows: MotionWindows) -> str:
    """Address of the model version that made the features. Raises: ValueError if it is not registered."""
    uri = tracking.tracking_uri()
    made_by = windows.features.manifest["config"]["model_hash"]
    address = version_of_content(uri, made_by)
    if not address:
        raise ValueError(
            f"register=true, but the model that made features={windows.features.url} (content {made_by[:12]}) is not "
            f"in the registry at {uri}; register it first (`kinema register`) and embed with models:/NAME@ALIAS"
        )
    return address


def register_index(folder: Path, windows: MotionWindows, facts: dict[str, Any]) -> str:
    """Put an index's files into a run, and its address on the model's version; returns the version's address.

    Raises: ValueError if the model that made the features is not registered.
    """
    address = registered_model(windows)
    tracker = tracking.start_run(
        "",
        "search-index",
        {"index": facts},
        tags={"kinema.kind": "search_index", "kinema.model_version": address},
        inputs={"features": (windows.features.url, windows.features.manifest_hash())},
    )
    for name in INDEX_FILES:
        tracker.log_artifact(folder / name, FOLDER)
    if isinstance(facts.get("recall"), float):
        tracker.log_metrics({"recall": facts["recall"]})
    tracker.end()
    registry = Registry.at(tracking.tracking_uri(), address)
    version, _ = registry.resolve(address)
    registry.set_tag(version, f"{TAG}{windows.features.plan8}", f"runs:/{tracker.run_id}/{FOLDER}")
    return address


def fetch_index(address: str, windows: MotionWindows, into: Path) -> Path:
    """The folder of the index registered beside models:/NAME@ALIAS for these features.

    Raises: ValueError if there is none.
    """
    import mlflow

    uri = tracking.tracking_uri()
    registry = Registry.at(uri, address)
    version, _ = registry.resolve(address)
    tags = registry.tags(version)
    source = tags.get(f"{TAG}{windows.features.plan8}")
    if source is None:
        others = sorted(name.removeprefix(TAG) for name in tags if name.startswith(TAG))
        known = f"only for features {', '.join(others)}" if others else "none"
        raise ValueError(
            f"index={address} has no index of features {windows.features.plan8} ({known}); make one with "
            "method=approximate register=true"
        )
    into.mkdir(parents=True, exist_ok=True)
    target = tempfile.mkdtemp(prefix="registered-", dir=into)
    return Path(mlflow.artifacts.download_artifacts(artifact_uri=source, dst_path=target, tracking_uri=uri))
