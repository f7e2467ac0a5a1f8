"""What a training reads: stored clips with their sidecars, or shots that are rendered when they are asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kinema.configs import TrainConfig
from kinema.configs.loader import LoaderConfig, PairFilterConfig
from kinema.configs.models.table import MODELS
from kinema.configs.rendered import RENDERED, RenderedSourceConfig
from kinema.pipelines.artifacts import Artifact
from kinema.pipelines.loader import ClipIndex, Loader
from kinema.pipelines.loader.rendered import RenderedIndex
from kinema.pipelines.train.loop import rank_batch_size
from kinema.pipelines.train.parallel import Place

_TAKES_RENDERED = ("flow", "features")
"""Kinds of models that learn from a pair of frames and its flow."""
_INSTEAD = {
    "tracks": "kinema shard layout=rendered rendered.num_frames=24 rendered.tracks_grid=32 out=DIR",
    "": "kinema shard layout=rendered rendered.num_frames=24 out=DIR",
}


@dataclass(frozen=True)
class ClipLoader:
    """Makes each rank's loader; pickled to the ranks."""

    config: TrainConfig
    recipe: Any

    def __call__(self, place: Place) -> Any:
        config = self.config
        index: Any = self.index()  # a RenderedIndex answers what the loader asks of a ClipIndex
        return Loader(
            index,
            self.recipe.read_sample,
            config.loader,
            batch_size=rank_batch_size(config, place.world_size),
            seed=config.seed,
            rank=place.rank,
            world_size=place.world_size,
            pin_memory=place.device.type == "cuda",
            read_samples=getattr(self.recipe, "read_samples", None),
        )

    def index(self) -> ClipIndex | RenderedIndex:
        """The clips to train on; ValueError with reasons and counts if there are none."""
        return self.all_clips().split(self.config.loader.hold_out)[0]

    def held_out(self) -> ClipIndex | RenderedIndex:
        """The clips that were kept out of training; all of them if none were."""
        return self.all_clips().split(self.config.loader.hold_out)[1]

    def all_clips(self) -> ClipIndex | RenderedIndex:
        """Every usable clip."""
        config, with_flow = self.config, "flow" in self.recipe.needs
        if config.clips == RENDERED:
            return RenderedIndex.of(config.rendered)
        return ClipIndex.open(
            config.clips,
            config.flow if with_flow else None,
            config.tracks if "tracks" in self.recipe.needs else None,
            min_motion=config.loader.min_motion,
            skip_duplicates=config.loader.skip_duplicates,
            other_flows=config.other_flow if with_flow else (),
            flow_use=config.flow_use,
            pairs=config.loader.pairs,
        )


def check_source(config: TrainConfig, needs: tuple[str, ...]) -> None:
    """Raises: ValueError for data that are not named, or settings that the data cannot follow."""
    if not config.clips:
        raise ValueError(
            "train.clips is empty; name the clips artifact: clips=DIR (made by `kinema shard`), or clips=rendered"
        )
    if config.clips == RENDERED:
        _check_rendered(config)
        return
    if config.rendered != RenderedSourceConfig():
        raise ValueError(f"rendered.* has no effect with clips={config.clips}; leave it out, or use clips=rendered")
    for need in needs:
        if not getattr(config, need):
            raise ValueError(f"train.{need} is empty and {config.model} needs it; name the artifact: {need}=DIR")


def _check_rendered(config: TrainConfig) -> None:
    row = MODELS[config.model]
    if row.kind not in _TAKES_RENDERED:
        needed = "tracks" if "tracks" in row.needs else ""
        raise ValueError(
            f"clips=rendered gives pairs of frames with flow, and model={config.model} learns from "
            f"{needed or 'longer clips'}; store rendered clips first: {_INSTEAD[needed]}"
        )
    own, usual = config.loader, LoaderConfig()
    stored = {
        "flow": (config.flow, ""),
        "other_flow": (list(config.other_flow), []),
        "tracks": (config.tracks, ""),
        "loader.mode": (own.mode, usual.mode),
        "loader.min_motion": (own.min_motion, usual.min_motion),
    }
    for key, (value, default) in stored.items():
        if value != default:
            raise ValueError(f"{key}={value} is for stored clips, and clips=rendered has none; leave {key} out")
    if own.pairs != PairFilterConfig():
        raise ValueError("loader.pairs.* filters stored flow, and that of clips=rendered is exact; leave it out")


def source_inputs(config: TrainConfig, needs: tuple[str, ...]) -> dict[str, tuple[str, str]]:
    """{name: (url, hash of the content)} of what training reads."""
    if config.clips == RENDERED:
        return {"clips": (RENDERED, RenderedIndex.of(config.rendered).content_hash())}
    urls = {name: getattr(config, name) for name in ("clips", *needs)}
    if "flow" in needs:
        urls |= {f"flow_{number}": url for number, url in enumerate(config.other_flow, start=1)}
    return {name: (url, Artifact.read(url).manifest_hash()) for name, url in urls.items()}
