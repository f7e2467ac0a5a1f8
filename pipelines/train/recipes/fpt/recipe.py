"""The Flow Poke Transformer's side of training: one frame and the motion of stored tracks, likelihood, pictures.

Source: Baumann et al., "What If: Understanding Motion Through Sparse Interactions", ICCV 2025, arXiv:2510.12777.
Deviations: queries are drawn without the published bias (`queries: published` brings it back), the time gap is given in
seconds, frames are handed over in 8 bits, and what the checkpoint holds but never uses is not trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn

from kinema.configs import FPTConfig, TrainConfig
from kinema.models.fpt.data_rules import (
    Motion,
    NoTrainingSample,
    SamplingRule,
    TrainingPoints,
    build_targets,
    central_square,
    extract_motion,
    gap_in_frames,
    points_in_square,
)
from kinema.models.fpt.model import PRESETS, FlowPokeTransformer
from kinema.models.weights import LEDGER, licence_notice, load_weights, published_file
from kinema.pipelines.loader import Clip, Skip
from kinema.pipelines.sidecars.tracks_codec import Frames, StoredTracks
from kinema.pipelines.train.checkpoint import weights_file
from kinema.pipelines.train.recipes.fpt.metrics import prediction_metrics
from kinema.pipelines.train.recipes.fpt.pictures import prediction_pictures
from kinema.pipelines.train.recipes.protocol import Batch, ExportedModel, Loss, as_count

Sample = dict[str, Any]


@dataclass(frozen=True)
class FPTRecipe:
    """See `protocol.Recipe`. `weights` (a run, a checkpoint or a published file) starts the whole model."""

    config: FPTConfig
    weights: str = ""
    needs: tuple[str, ...] = ("tracks",)
    compiles_on_gpu: ClassVar[bool] = True

    @classmethod
    def of(cls, config: TrainConfig) -> FPTRecipe:
        """From a training's config."""
        return cls(config.settings, config.weights)

    @property
    def rule(self) -> SamplingRule:
        """How pokes and queries are drawn."""
        config = self.config
        return SamplingRule(
            num_pokes=config.num_pokes,
            queries_per_poke=config.queries_per_poke,
            min_num_tracks=config.min_tracks,
            unbiased=config.queries == "unbiased",
            allow_overlap=config.allow_overlap,
            allow_invisible_ends=config.allow_invisible_ends,
            allow_out_of_frame_ends=config.allow_out_of_frame_ends,
            static_flow=config.static_flow,
            static_share=config.static_share,
        )

    def check(self) -> None:
        """Refuse, before anything starts, weights that do not fit (ValueError)."""
        if self.weights or self.config.encoder_weights:
            self._load_start(self._new_model())

    def notices(self) -> tuple[str, ...]:
        """What a user must know of a model trained so."""
        encoder = PRESETS[self.config.preset]["image_encoder"]
        if self.weights:
            return tuple(filter(None, [licence_notice("fpt_base")]))
        if self.config.encoder_weights:
            return ()
        return (
            f"the image encoder {encoder} starts untrained; set train.fpt.encoder_weights to a file or to `published` "
            "for one that knows images",
        )

    def build(self) -> FlowPokeTransformer:
        """The model, image encoder included, from its initialisation or from weights as the config asks."""
        model = self._new_model()
        self._load_start(model)
        for unused in model.unused_parameters():
            unused.requires_grad_(False)
        return model.train()

    def compiled_units(self, module: nn.Module) -> list[nn.Module]:
        """The transformer's layers: adaptive norms, residuals and gated products around the attention."""
        assert isinstance(module, FlowPokeTransformer)
        return list(module.transformer.layer_list())

    def read_sample(self, clip: Clip, rng: np.random.Generator) -> Sample | Skip:
        """One frame of the clip, and pokes and queries from its tracks; see `read_samples`."""
        return self.read_samples(clip, [rng])[0]

    def read_samples(self, clip: Clip, rngs: Sequence[np.random.Generator]) -> list[Sample | Skip]:
        """One sample for each generator; tracks and groups of pictures are read and decoded once for all of them.

        Returns: image uint8 [S, S, 3], poke_pos and poke_flow float32 [P, 2], query_pos and query_flow float32
            [P, n, 2], camera_static bool; positions in 0..1 over the square, flow in the same units.
        """
        rule = self.rule
        tracks = clip.stored_tracks()
        points = _PointsInSquare(tracks)
        gap = gap_in_frames(self.config.gap_s, clip.fps)
        drawn: list[tuple[int, TrainingPoints | Skip]] = []
        for rng in rngs:
            try:
                motion = draw_motion(points, tracks.visible, gap, rule, rng)
                drawn.append((motion.start, build_targets(motion, rule, rng)))
            except NoTrainingSample as error:
                drawn.append((-1, Skip(error.reason)))
        frames = clip.pictures({start for start, _ in drawn if start >= 0})
        images = {t: square_pixels(frame, self.config.image_px) for t, frame in frames.items()}
        samples: list[Sample | Skip] = []
        for start, found in drawn:
            if isinstance(found, Skip):
                samples.append(found)
                continue
            names = ("poke_pos", "poke_flow", "query_pos", "query_flow")
            targets = {name: torch.from_numpy(np.ascontiguousarray(getattr(found, name), np.float32)) for name in names}
            samples.append({"image": images[start], **targets, "camera_static": found.camera_static})
        return samples

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """Mean negative log-likelihood of the queries' flow in float64; every sample counts."""
        assert isinstance(module, FlowPokeTransformer)
        pokes, static = (batch["poke_pos"], batch["poke_flow"]), batch["camera_static"]
        d_img = module.embed_image(model_image(batch["image"]))
        mixture = module.predict_prefixes(*pokes, batch["query_pos"], static, d_img)
        nll = -mixture.log_prob(batch["query_flow"].double())
        metrics = prediction_metrics(mixture, batch["query_flow"], nll, self.config.pck_thresholds)
        metrics["camera_static_share"] = batch["camera_static"].double().mean()
        return Loss(nll.mean(), as_count(len(nll), nll), metrics)

    def after_step(self, module: nn.Module, step: int) -> None:
        """Nothing follows the weights."""

    def pictures(self, module: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of the image with pokes, the density at a query, the mean flow, and one joint sample."""
        assert isinstance(module, FlowPokeTransformer)
        return {"pokes_density_mean_sample": prediction_pictures(module, batch, model_image(batch["image"]))}

    def published_model(self, tensors: Mapping[str, Tensor], ema: bool = True) -> FlowPokeTransformer:
        """The model with a checkpoint's tensors."""
        model = self._new_model()
        model.load_state_dict(tensors)
        return model.eval()

    def export(self, model: nn.Module) -> ExportedModel:
        """Constructor arguments and tensors under the published keys."""
        assert isinstance(model, FlowPokeTransformer)
        arguments = PRESETS[self.config.preset]
        licences = {}
        source = self.config.encoder_weights
        if source:
            name = str(arguments["image_encoder"])
            known = source == "published" and name in LEDGER
            licences["encoder"] = LEDGER[name].licence if known else f"that of {Path(source).name}"
        return ExportedModel(
            architecture="fpt",
            config=dict(arguments),
            tensors=dict(model.state_dict()),
            inputs={"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
            licences=licences,
        )

    def _new_model(self) -> FlowPokeTransformer:
        return FlowPokeTransformer(**PRESETS[self.config.preset])  # type: ignore[arg-type]

    def _load_start(self, model: FlowPokeTransformer) -> None:
        source, name = self.config.encoder_weights, str(PRESETS[self.config.preset]["image_encoder"])
        if source:
            if source == "published" and name not in LEDGER:
                raise ValueError(
                    f"train.fpt.encoder_weights=published, but there are none for {name}, the encoder of "
                    f"{self.config.preset}; leave it empty"
                )
            load_weights(model.image_embedder.model, published_file(name) if source == "published" else source, name)
        if self.weights:
            load_weights(model, weights_file(self.weights), self.config.preset)


class _PointsInSquare:
    """Positions of stored tracks in 0..1 over the square; indexed by frames, which alone are computed."""

    def __init__(self, tracks: StoredTracks):
        self.tracks = tracks

    def __len__(self) -> int:
        return len(self.tracks.visible)

    def __getitem__(self, frames: Frames) -> Float[np.ndarray, "t N 2"]:
        return points_in_square(self.tracks.points_px(frames), *self.tracks.size)


def draw_motion(
    points: Float[np.ndarray, "T N 2"] | _PointsInSquare,
    visible: Bool[np.ndarray, "T N"],
    gap_frames: int,
    rule: SamplingRule,
    rng: np.random.Generator,
) -> Motion:
    """As `extract_motion` draws it, without looking at the whole clip: start frames are tried in random order.

    The first that gives enough tracks is one drawn evenly from all that do. Raises: NoTrainingSample.
    """
    if rule.unbiased:
        for start in rng.permutation(max(0, len(points) - gap_frames)):
            both = [start, start + gap_frames]
            with contextlib.suppress(NoTrainingSample):
                motion = extract_motion(points[both], visible[both], 1, rule, rng)
                return replace(motion, start=int(start), end=int(start) + gap_frames)
    # The published rule, or the reason why no start frame of the clip will do.
    return extract_motion(points[:], visible, gap_frames, rule, rng)


def square_pixels(frame: UInt8[np.ndarray, "H W 3"], side: int) -> UInt8[Tensor, "side side 3"]:
    """The central square of a frame, resized bicubically with antialiasing; stays in 8 bits."""
    top, left, length = central_square(*frame.shape[:2])
    square = torch.from_numpy(frame[top : top + length, left : left + length])
    if length == side:
        return square.contiguous()
    planes = rearrange(square, "h w c -> 1 c h w")
    resized = F.interpolate(planes, (side, side), mode="bicubic", antialias=True)
    return rearrange(resized, "1 c h w -> h w c").contiguous()


def model_image(pixels: UInt8[Tensor, "B S S 3"]) -> Tensor:
    """Pixels as the model takes them: float32 [B, 3, S, S] in -1..1."""
    return rearrange(pixels, "b h w c -> b c h w").float().div_(127.5).sub_(1)
