"""`kinema inspect`: a page about one artifact or training run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.artifacts.layout import MANIFEST
from kinema.pipelines.report import sections
from kinema.pipelines.report.features import add_features
from kinema.pipelines.report.page import Page
from kinema.pipelines.report.teachers import add_teachers

_TITLES = {"clips": "Clips", "flow": "Optical flow", "tracks": "Point tracks", "features": "Features"}


@dataclass(frozen=True)
class InspectSummary:
    """Where the page is."""

    page: str
    """Path of the HTML file."""
    kind: str
    """`clips`, `flow`, `tracks`, `features`, `run` or `teachers`."""
    files: int = 0
    """Pictures and films written beside it."""


def inspect(target: str, out: str | None = None, pictures: str | None = None) -> InspectSummary:
    """Make the page; beside a local target by default, in the current folder for a URL.

    Args: pictures, a folder for the page's pictures and films as files.

    Raises: ValueError if the target is neither an artifact nor a run.
    """
    local = "://" not in target
    name = target.rstrip("/").rsplit("/", 1)[-1] or "artifact"
    path = Path(out) if out else (Path(target).resolve().parent if local else Path()) / f"{name}_inspect.html"
    if path.suffix != ".html":
        path = path / f"{name}_inspect.html"
    if local and (Path(target) / "run.json").is_file():
        page, kind = Page(f"Training run {name}", str(Path(target).resolve())), "run"
        page.section("Training")
        sections.add_run(page, target)
        sections.add_run_facts(page, target)
    elif local and not (Path(target) / "manifest.json").is_file():
        raise ValueError(f"{target} is neither an artifact (manifest.json) nor a run (run.json); check the path")
    else:
        artifact = Artifact.read(target)
        page, kind = Page(f"{_TITLES.get(artifact.kind, artifact.kind)}: {name}", artifact.url), artifact.kind
        _artifact(page, artifact)
    written = page.write_media(pictures) if pictures else 0
    return InspectSummary(str(page.write(path)), kind, written)


def inspect_teachers(
    targets: Sequence[str], out: str | None = None, pictures: str | None = None, truth: str | None = None
) -> InspectSummary:
    """One page about the flow that several teachers found in the same clips; see `report.teachers`.

    Args: truth, a flow artifact with the true motion, or the folder of rendered videos that the clips were cut from.
    Raises: ValueError for artifacts that are not flow of the same clips, or whose clips are not beside them.
    """
    first = Artifact.read(targets[0])
    clips = clips_beside(first)
    if clips is None:
        raise ValueError(f"{targets[0]}: its clips were not found beside it or its folder; pictures need them")
    page = Page("Teachers side by side", ", ".join(targets))
    add_teachers(page, targets, clips, truth or "")
    folder = Path() if "://" in targets[0] else Path(targets[0]).resolve().parent
    path = Path(out) if out else folder / "teachers_inspect.html"
    if path.suffix != ".html":
        path = path / "teachers_inspect.html"
    written = page.write_media(pictures) if pictures else 0
    return InspectSummary(str(page.write(path)), "teachers", written)


def _artifact(page: Page, artifact: Artifact) -> None:
    sections.add_quarantine(page, [artifact])
    page.section("What it holds")
    if artifact.kind == "clips":
        sections.add_clips(page, artifact.url)
    elif artifact.kind in ("flow", "tracks"):
        clips = clips_beside(artifact)
        if clips is None:
            page.text("The clips were not found beside this artifact or its folder, so no pictures are shown.")
        add = sections.add_flow if artifact.kind == "flow" else sections.add_tracks
        add(page, artifact.url, clips)
    elif artifact.kind == "features":
        add_features(page, artifact, clips_beside(artifact))
    else:
        samples = artifact.samples()
        page.numbers({"samples": samples.num_rows, "shards": len(artifact.commits())})
    page.section("Made with")
    page.table([{"key": k, "value": str(v)} for k, v in _flat(artifact.manifest["config"])])


def clips_beside(sidecar: Artifact) -> str | None:
    """The clips artifact that a sidecar on this machine was made from, in a folder beside it or beside its parent."""
    wanted = sidecar.manifest["inputs"].get("clips")
    if "://" in sidecar.url or not wanted:
        return None
    folder = Path(sidecar.url).parent
    places = [folder.parent / "clips", folder / "clips", *sorted(folder.iterdir()), *sorted(folder.parent.iterdir())]
    return next((str(place) for place in places if _holds_clips(place, wanted)), None)


def _holds_clips(folder: Path, plan8: str) -> bool:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return manifest["kind"] == "clips" and manifest["plan8"] == plan8
    except (OSError, ValueError, LookupError, TypeError):
        return False  # no artifact, or none of ours


def _flat(config: dict, prefix: str = "") -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for key, value in config.items():
        rows += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows
