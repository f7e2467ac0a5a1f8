"""Training of DinoFlow on stored flow: ground truth, rendered, or another network's.

The module is the model itself, encoder included, so a checkpoint's model.safetensors is what `kinema teach weights=`
takes.

Source: model card of blanchon/dinoflow-model: Chairs, then Things, at 512 x 512 in batches of 48 for 24 epochs; AdamW
at 4e-4, two epochs of warm-up, then polynomial decay; masked L1 end-point loss with a cap of 400 px; RAFT's
augmentation; the encoder frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from kinema.configs import TrainConfig
from kinema.configs.models.dinoflow import DinoFlowConfig
from kinema.kernels import local_correlation
from kinema.models.dinoflow.head import RADIUS
from kinema.models.dinoflow.loss import endpoint_loss, matching_loss
from kinema.models.dinoflow.model import DinoFlowFeatures, FlowModel, FlowModelConfig, published_name
from kinema.models.flow.raft.loss import flow_errors
from kinema.models.weights import LEDGER, load_weights, published_file
from kinema.pipelines.loader import Clip, Skip
from kinema.pipelines.train.checkpoint import weights_file
from kinema.pipelines.train.flow_augmentation import augment
from kinema.pipelines.train.flow_pairs import NOTHING_KNOWN, as_tensors, flow_pictures, stored_pair
from kinema.pipelines.train.recipes.protocol import Batch, ExportedModel, Loss


@dataclass(frozen=True)
class DinoFlowRecipe:
    """See `protocol.Recipe`."""

    config: DinoFlowConfig
    weights: str = ""
    needs = ("flow",)

    @classmethod
    def of(cls, config: TrainConfig) -> DinoFlowRecipe:
        """From a training's config."""
        return cls(config.settings, config.weights)

    def check(self) -> None:
        """Refuse, before anything starts, settings and weights that cannot work (ValueError)."""
        model = self.build()
        patch = model.encoder.patch_size
        if self.config.matching and any(side % patch for side in self.config.crop):
            raise ValueError(
                f"dinoflow.matching={self.config.matching:g} compares whole patches, and dinoflow.crop="
                f"[{self.config.crop[0]},{self.config.crop[1]}] is no multiple of their {patch} px; change the crop"
            )

    def notices(self) -> tuple[str, ...]:
        """What a user must know of a model trained so."""
        if self.config.backbone_weights or self.weights or not self.config.freeze_encoder:
            return ()
        return (
            "the frozen encoder has no weights (dinoflow.backbone_weights is empty): the head learns from random "
            "features; give a checkpoint, or dinoflow.freeze_encoder=false",
        )

    def build(self) -> FlowModel:
        """The model, its encoder from `backbone_weights`, all of it from `weights` where given."""
        model = FlowModel(self._model_config())
        name, source = published_name(self.config.backbone), self.config.backbone_weights
        if source:
            load_weights(model.encoder, published_file(name) if source == "published" else source, name)
            model.encoder_is_trained = True
        if self.weights:
            load_weights(model, weights_file(self.weights), "dinoflow_vits16")
        return model.train()

    def read_sample(self, clip: Clip, rng: np.random.Generator) -> dict[str, Tensor] | Skip:
        """One stored pair, augmented; see `flow_pairs.as_tensors`."""
        config = self.config
        pair = stored_pair(clip, rng, config.gap, config.visible_only, "dinoflow")
        if isinstance(pair, Skip):
            return pair
        if config.augment == "off" and (pair.size[0] < config.crop[0] or pair.size[1] < config.crop[1]):
            return Skip(f"frames smaller than dinoflow.crop=[{config.crop[0]},{config.crop[1]}]: lower it")
        pair = augment(pair, config.augment, config.augmentation, config.crop, rng)
        return as_tensors(pair) if pair.valid.any() else NOTHING_KNOWN

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """Mean over the samples with a pixel that counts."""
        images = torch.cat([batch[name].float() / 255 for name in ("image1", "image2")])
        flow_px, valid, cap = batch["flow_px"], batch["valid"], self.config.max_motion_px
        features: DinoFlowFeatures = module.encode(images)  # type: ignore[operator]
        first, second = features[: len(flow_px)], features[len(flow_px) :]
        flow = module.flow_from_features(first, second)  # type: ignore[operator]
        errors, counted = endpoint_loss(flow, flow_px, valid, cap)
        number = counted.sum().float()
        # Samples without a counted pixel have an error of 0 that still reaches every parameter.
        total = errors.sum()
        if self.config.matching:
            correlation = local_correlation(first.fused, second.fused, RADIUS)
            total = total + self.config.matching * matching_loss(correlation, flow_px, valid)[counted].sum()
        value = total / number.clamp_min(1)
        metrics = (
            flow_errors(flow.detach(), flow_px, valid, cap) if bool(counted.any()) else dict.fromkeys(_METRICS, 0.0)
        )
        return Loss(value, number, {name: value.new_tensor(metrics[name]) for name in _METRICS})

    def after_step(self, module: nn.Module, step: int) -> None:
        """Nothing follows the weights."""

    def pictures(self, module: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of frame, known flow and predicted flow."""
        return flow_pictures(module, batch)

    def published_model(self, tensors: Mapping[str, Tensor], ema: bool = True) -> nn.Module:
        """The model with a checkpoint's tensors."""
        model = FlowModel(self._model_config())
        model.load_state_dict(tensors)
        return model.eval()

    def export(self, model: nn.Module) -> ExportedModel:
        """The model's settings and tensors."""
        assert isinstance(model, FlowModel)
        backbone = published_name(model.config.backbone)
        licences = {backbone: LEDGER[backbone].licence} if self.config.backbone_weights and backbone in LEDGER else {}
        config = {"config": dataclasses.asdict(model.config)}
        return ExportedModel("dinoflow", config, dict(model.state_dict()), licences=licences)

    def _model_config(self) -> FlowModelConfig:
        config = self.config
        return FlowModelConfig(
            config.backbone, config.width, config.reading, freeze_encoder=config.freeze_encoder, image_size=config.crop
        )


_METRICS = ("epe", "px1", "px3", "px5")
