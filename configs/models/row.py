"""What the program knows of one model. Code is named by reference, `module:attribute`, and imported when needed."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["features", "flow", "pokes", "tracks", "motion", "video"]


def resolve(reference: str) -> Any:
    """The object that `module:attribute` names."""
    module, _, attribute = reference.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class TeacherFacts:
    """How a flow network serves `kinema teach`."""

    load: str
    """Class whose instances are the teacher: `load(TeacherSpec)`, see pipelines/teach/protocol.py."""
    iters: int = 0
    """Refinements when none are asked for; 0 for networks without."""
    needs_weights: bool = True
    """Whether it is a network with learned weights; one without also runs on the CPU only."""
    takes_scale: bool = False
    """Whether it can be run at another size than the frames'."""
    takes_padding: bool = False
    """Whether `padding=` means something to it."""
    gives_uncertainty: bool = False
    """Whether it states the error it expects."""
    sees_occlusion: bool = False
    """Whether it says itself which pixels are hidden, from a whole clip (`ClipTeacher`); its frames are not tiled."""
    judges_flow: bool = False
    """Whether it looks at other teachers' stored flow (`from`) besides the frames."""
    actor_bytes: int = 4 << 30
    """Memory one of them may take on a CPU; bounds the number of actors."""


@dataclass(frozen=True)
class TrackerFacts:
    """How a tracker serves `kinema track` and TAP-Vid."""

    load: str
    """`load(weights, iters, device)` -> tracker, see pipelines/track/trackers.py."""
    benchmark: str
    """`benchmark(TrackerSettings)` -> tracker of a video, see pipelines/evaluate/tapvid/trackers.py."""
    iters: int = 0
    """Refinements when none are asked for; 0 for trackers without."""
    needs_weights: bool = True
    """Whether it is a network with learned weights."""
    follows_flow: bool = False
    """Whether it reads a flow artifact instead of frames."""
    actor_bytes: int = 0
    """Memory one of them may take on a CPU; bounds the number of actors."""


@dataclass(frozen=True)
class ModelRow:
    """One model: its names, its code, its settings, what it is for and what is known of it."""

    name: str
    """As in `model=`, `teacher=` and `tracker=`."""
    title: str
    """As its paper writes it."""
    kind: Kind
    """What it gives: dense features, flow, a distribution of flow given pokes, tracks, motion embeddings, or video."""
    summary: str
    """One sentence."""
    network: str = ""
    """Its class; empty if it is no network."""
    build: str = ""
    """`build(pretrained=, weights=)` -> the network in eval mode; with `presets`, the name comes first."""
    presets: str = ""
    """Mapping of the names under which `build` knows it, where they are others than the row's."""
    hub: str = ""
    """Entry of hubconf.py."""
    weights: str = ""
    """Entry of the ledger (models/weights.py) with the published checkpoint, its licence and paper; empty: none."""
    parameters: int = 0
    """Number of parameters, encoders included; 0 if it has none or several sizes."""
    published: Mapping[str, str] = field(default_factory=dict)
    """{benchmark: figure} that its paper reports."""
    recipe: str = ""
    """Class of its training, see pipelines/train/recipes/protocol.py; empty: not trained here."""
    settings: type | None = None
    """Dataclass of that training's settings."""
    section: str = ""
    """Name of these settings in files and on the command line."""
    needs: tuple[str, ...] = ()
    """Sidecars that training reads: flow, tracks."""
    teacher: TeacherFacts | None = None
    """How it serves `kinema teach`, if it does."""
    tracker: TrackerFacts | None = None
    """How it serves `kinema track`, if it does."""
    benchmarks: tuple[str, ...] = ()
    """Benchmarks of `kinema evaluate` that take it."""
    serving: str = ""
    """Module in pipelines/registry/shipped that answers `predict` for it; empty: not registered."""
    registered_name: str = ""
    """Name in the registry when none is given."""
    demo: str = ""
    """`demo(config_path, overrides)` of `kinema demo NAME`, if there is one."""

    def names(self) -> tuple[str, ...]:
        """Every name under which `make` makes it."""
        return tuple(resolve(self.presets)) if self.presets else (self.name,)

    def make(self, name: str = "", pretrained: bool = False, weights: Any = None, **options: Any) -> Any:
        """The network in eval mode, by one of its names (default: the first)."""
        which = (name or self.names()[0],) if self.presets else ()
        return resolve(self.build)(*which, pretrained=pretrained, weights=weights or None, **options)
