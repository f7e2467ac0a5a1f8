"""DisMo's side of training: clips of video alone, flow-matching loss, averaged weights, pictures, export.

Source: Ressler-Antal et al., "DisMo: Disentangled Motion Representations for Open-World Motion Transfer", NeurIPS 2025,
arXiv:2511.23428. Deviations: clips are chosen by time, every random choice is seeded by the sample, noise levels of a
batch are spread evenly, weights are averaged.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from kinema.configs import DisMoConfig, TrainConfig
from kinema.models.dismo import DisMo, FrameGenerator, MotionExtractor
from kinema.models.dismo.autoencoder import Autoencoder, load_autoencoder
from kinema.models.dismo.layers import TransformerLayer
from kinema.models.dismo.presets import PRESETS
from kinema.models.weights import LEDGER, load_weights, published_file
from kinema.pipelines.loader import Clip, ClipIndex, Skip
from kinema.pipelines.train.recipes.dismo.measures import label_accuracies
from kinema.pipelines.train.recipes.dismo.metrics import draw_noise_shares, spread, step_metrics
from kinema.pipelines.train.recipes.dismo.module import DisMoTraining
from kinema.pipelines.train.recipes.dismo.pictures import generated_pictures
from kinema.pipelines.train.recipes.dismo.samples import Sample, read_samples
from kinema.pipelines.train.recipes.protocol import Batch, ExportedModel, Loss, as_count


@dataclass(frozen=True)
class DisMoRecipe:
    """See `protocol.Recipe`. `weights` (a published motion extractor, or a run of this model) starts the model."""

    config: DisMoConfig
    weights: str = ""
    needs: tuple[str, ...] = ()
    compiles_on_gpu: ClassVar[bool] = True

    @classmethod
    def of(cls, config: TrainConfig) -> DisMoRecipe:
        """From a training's config."""
        return cls(config.settings, config.weights)

    def check(self) -> None:
        """Refuse, before anything starts, settings and weights that cannot work (ValueError)."""
        autoencoder = self._autoencoder(torch.device("cpu"))
        generator = self._shape()[1]
        if autoencoder.channels != generator.latent_channels:
            raise ValueError(
                f"dismo.autoencoder={self.config.autoencoder} has {autoencoder.channels} channels, but the generator "
                f"of dismo.preset={self.config.preset} makes {generator.latent_channels}; choose others that fit"
            )
        side = autoencoder.pixels_per_latent * generator.token_merge.patch[0]
        if self.config.frame_px % side:
            raise ValueError(
                f"dismo.frame_px={self.config.frame_px} is no multiple of {side}, the side of a token's pixels; use "
                f"{max(1, round(self.config.frame_px / side)) * side}"
            )
        if self.weights or self.config.encoder_weights:
            self._load_start(self._new_model())

    def notices(self) -> tuple[str, ...]:
        """What a user must know of a model trained so."""
        if self.weights or self.config.encoder_weights:
            return ()
        return (
            "DisMo's image encoders start untrained; set dismo.encoder_weights to a file or to `published` for ones "
            "that know images",
        )

    def build(self) -> DisMoTraining:
        """The model and its average, from initialisation or from weights as the config asks."""
        model = self._new_model()
        if self.config.initial_spread > 0:
            _spread_out(model.motion_extractor, self.config.initial_spread)
        self._load_start(model)
        module = DisMoTraining(model, self.config.ema_decay, self.config.ema_every).train()
        extractor, transformer = model.motion_extractor, model.frame_generator.transformer
        extractor.checkpoint_layers = transformer.checkpoint_layers = self.config.checkpoint_layers
        return module

    def compiled_units(self, module: nn.Module) -> list[nn.Module]:
        """The transformers' layers."""
        assert isinstance(module, DisMoTraining)
        return [*module.model.motion_extractor.layers, *module.model.frame_generator.transformer.layers]

    def shard_units(self, module: nn.Module) -> list[nn.Module]:
        """The transformers' layers, then what is around them, of the model and of its average."""
        assert isinstance(module, DisMoTraining)
        units: list[nn.Module] = []
        for model in (module.model, module.chosen()):
            extractor, generator = model.motion_extractor, model.frame_generator
            units += [*extractor.layers, *generator.transformer.layers, extractor, generator]
        return units

    def read_sample(self, clip: Clip, rng: np.random.Generator) -> Sample | Skip:
        """See `samples.read_samples`."""
        return self.read_samples(clip, [rng])[0]

    def read_samples(self, clip: Clip, rngs: Sequence[np.random.Generator]) -> list[Sample | Skip]:
        """See `samples.read_samples`."""
        extractor = self._shape()[0]
        return read_samples(clip, rngs, self.config, extractor.window, extractor.max_delta_time)

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """Mean squared error of the velocity over all pairs; every sample counts."""
        assert isinstance(module, DisMoTraining)
        target = _unit_range(rearrange(batch["target"], "b p h w c -> (b p) h w c"))
        t = draw_noise_shares(len(target), target.device, self.config.noise_shift)
        latents = self._autoencoder(target.device).encode(target)
        result = module.model(
            _unit_range(batch["motion"]), _unit_range(batch["source"]), latents, batch["delta_time"], t=t
        )
        metrics = step_metrics(result, t, self.config.collapse_spread, self.config.noise_shift)
        return Loss(result.loss, as_count(len(batch["motion"]), target), metrics)

    def after_step(self, module: nn.Module, step: int) -> None:
        """The averaged weights follow."""
        assert isinstance(module, DisMoTraining)
        module.average.update()

    def pictures(self, module: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of source, target, and frame generated by the averaged weights; says so if embeddings are all alike."""
        assert isinstance(module, DisMoTraining)
        model = module.chosen()
        motion, source, target = (_unit_range(batch[name]) for name in ("motion", "source", "target"))
        found = float(spread(model.motion_extractor(motion).float()))
        if found < self.config.collapse_spread:
            sys.stderr.write(
                f"kinema train: embeddings of different clips differ by {found:.3f} of their size, less than "
                f"dismo.collapse_spread={self.config.collapse_spread}: they have collapsed; lower lr, or train longer\n"
            )
        autoencoder = self._autoencoder(motion.device)
        steps = self.config.sample_steps
        picture = generated_pictures(model, autoencoder, motion, source, target, batch["delta_time"], steps)
        return {"source_target_latent_generated": picture}

    def measure(self, module: nn.Module, clips: ClipIndex) -> dict[str, float]:
        """How well the averaged embeddings of held-out clips tell their labels; see `measures.label_accuracies`."""
        assert isinstance(module, DisMoTraining)
        return label_accuracies(module.chosen().motion_extractor, clips, self.config.fps)

    def published_model(self, tensors: Mapping[str, Tensor], ema: bool = True) -> MotionExtractor:
        """The motion extractor with a checkpoint's tensors."""
        return self.whole_model(tensors, ema).motion_extractor

    def whole_model(self, tensors: Mapping[str, Tensor], ema: bool = True) -> DisMo:
        """Extractor and generator with a checkpoint's tensors, in eval mode."""
        model = self._new_model()
        prefix = "average.ema_model." if ema else "model."
        found = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        model.load_state_dict(found)
        return model.eval()

    def export(self, model: nn.Module) -> ExportedModel:
        """The motion extractor: constructor arguments, and tensors under the published keys."""
        assert isinstance(model, MotionExtractor)
        arguments = PRESETS[self.config.preset]["motion_extractor_params"]
        licences = {}
        if source := self.config.encoder_weights:
            name = str(arguments["frame_encoder_params"]["model_version"])
            known = source == "published" and name in LEDGER
            licences["encoder"] = LEDGER[name].licence if known else f"that of {Path(source).name}"
        return ExportedModel(
            architecture="dismo",
            config={**arguments, "frame_encoder_params": dict(arguments["frame_encoder_params"])},
            tensors=dict(model.state_dict()),
            inputs={"fps": self.config.fps, "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)},
            licences=licences,
        )

    def _new_model(self) -> DisMo:
        return DisMo(**PRESETS[self.config.preset])

    def _shape(self) -> tuple[MotionExtractor, FrameGenerator]:
        """Extractor and generator without memory for their weights: what their sizes are."""
        return _without_weights(self.config.preset)

    def _autoencoder(self, device: torch.device) -> Autoencoder:
        config = self.config
        return _cached_autoencoder(config.autoencoder, config.pixels_per_latent, str(device), config.pixel_gain)

    def _load_start(self, model: DisMo) -> None:
        params = PRESETS[self.config.preset]["motion_extractor_params"]
        name, source = str(params["frame_encoder_params"]["model_version"]), self.config.encoder_weights
        if source:
            if source == "published" and name not in LEDGER:
                raise ValueError(
                    f"dismo.encoder_weights=published, but there are none for {name}, the encoder of "
                    f"{self.config.preset}; leave it empty"
                )
            file = published_file(name) if source == "published" else source
            for encoder in (model.motion_extractor.frame_encoder.model, model.frame_generator.source_encoder.model):
                load_weights(encoder, file, name)
        if not self.weights:
            return
        if Path(self.weights).is_dir():
            from kinema.pipelines.train.checkpoint import read_tensors, resolve_checkpoint

            tensors = read_tensors(resolve_checkpoint(self.weights, setting="weights"))
            model.load_state_dict(self.whole_model(tensors, ema=False).state_dict())
        else:
            load_weights(model.motion_extractor, self.weights, "motion_extractor_large")


def _spread_out(extractor: MotionExtractor, size: float) -> None:
    """Draw the weights that end the extractor's blocks, which otherwise begin at 0."""
    with torch.no_grad():
        for layer in extractor.layers:
            assert isinstance(layer, TransformerLayer)
            for linear in (layer.self_out, layer.ff.down_proj):
                linear.weight.normal_(0, size / linear.in_features**0.5)


@cache
def _without_weights(preset: str) -> tuple[MotionExtractor, FrameGenerator]:
    with torch.device("meta"):
        model = DisMo(**PRESETS[preset])
    return model.motion_extractor, model.frame_generator


@cache
def _cached_autoencoder(name: str, pixels_per_latent: int, device: str, pixel_gain: float) -> Autoencoder:
    """One per process and device; it is frozen, and no part of the model."""
    return load_autoencoder(name, pixels_per_latent, device, pixel_gain)


def _unit_range(frames: Tensor) -> Tensor:
    """uint8 frames in -1..1."""
    return frames.float() / 127.5 - 1
