"""FlowFeat's side of training: samples from clips and stored flow, loss, pictures, export.

Source: Araslanov, Sonnweber, Cremers, FlowFeat, NeurIPS 2025, section 3. Deviations: the teacher's flow is read
instead of computed, at the teacher's own resolution; samples without any flow edge are skipped and counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kinema.configs import FlowFeatConfig, TrainConfig
from kinema.models.backbones.convolutional import PYRAMIDS
from kinema.models.backbones.vision_transformer import CONFIGS
from kinema.models.flow.geometry import crop_flow, resize_flow
from kinema.models.flowfeat.model import FROM_SCRATCH, NAMES, FlowFeat
from kinema.models.flowfeat.training import FlowFeatLossConfig, FlowFeatTraining, random_crop_matrix
from kinema.models.weights import LEDGER, licence_notice, load_weights, published_file
from kinema.pipelines.loader import Clip, Skip
from kinema.pipelines.pictures.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    feature_pca,
    flow_picture,
    image_picture,
    normalise_images,
    panel,
)
from kinema.pipelines.train.recipes.protocol import Batch, ExportedModel, Loss

PICTURE_SAMPLES = 4


@dataclass(frozen=True)
class FlowFeatRecipe:
    """See `protocol.Recipe`. `weights` (a run, a checkpoint or a published file) starts encoder and decoder."""

    config: FlowFeatConfig
    weights: str = ""
    needs: tuple[str, ...] = ("flow",)
    learns_in_bf16: ClassVar[bool] = True  # tests/pipelines/test_learning.py compares

    @classmethod
    def of(cls, config: TrainConfig) -> FlowFeatRecipe:
        """From a training's config."""
        return cls(config.settings, config.weights)

    @property
    def backbone(self) -> str:
        """The encoder's name; ValueError for an unknown variant."""
        if self.config.variant not in NAMES:
            names = ", ".join(NAMES)
            raise ValueError(f"train.flowfeat.variant={self.config.variant!r} is not known; use one of {names}")
        return NAMES[self.config.variant]

    def check(self) -> None:
        """Refuse, before anything starts, settings and weights that cannot work (ValueError)."""
        config, patch = self.config, (PYRAMIDS.get(self.backbone) or CONFIGS[self.backbone]).patch_size
        if config.backbone_weights and self.backbone in FROM_SCRATCH:
            raise ValueError(
                f"train.flowfeat.backbone_weights={config.backbone_weights}: {self.backbone} learns its own; leave it "
                "out, or start from a run with weights=RUN"
            )
        if config.crop % patch:
            low = config.crop // patch * patch
            sizes = f"{low} or {low + patch}" if low else f"{patch}"
            raise ValueError(
                f"train.flowfeat.crop={config.crop} is no multiple of {self.backbone}'s patch {patch}; use {sizes}"
            )
        if self.weights or config.backbone_weights:
            self._load_start(self._new_module())

    def notices(self) -> tuple[str, ...]:
        """What a user must know of a model trained so."""
        if self.weights or self.config.backbone_weights:
            names = (self.backbone, f"flowfeat/{self.config.variant}")
            return tuple(dict.fromkeys(filter(None, map(licence_notice, names))))
        if self.backbone in FROM_SCRATCH:
            return ()
        return (
            f"the encoder {self.backbone} is untrained; set train.flowfeat.backbone_weights to a file or to "
            "`published` for useful features",
        )

    def build(self) -> FlowFeatTraining:
        """Frozen encoder, decoder, averaged decoder; weights as the config asks."""
        module = self._new_module()
        self._load_start(module)
        return module

    def read_sample(self, clip: Clip, rng: np.random.Generator) -> dict[str, Tensor] | Skip:
        """One frame, the flow from it to a neighbour, and two crops.

        Returns: image uint8 [3, S, S], flow float32 [2, s, s] in px of its own size, crop1 and crop2 [2, 3]; with
            confidence_px also confidence [1, s, s].
        """
        config = self.config
        pairs = [(t, gap) for t, gap in clip.flow_pairs if abs(gap) <= config.gap and (gap > 0 or config.time_flip)]
        if not pairs:
            return Skip("no flow pair with this gap")
        t, gap = pairs[int(rng.integers(len(pairs)))]
        size = (config.resize, config.resize)
        crops = [random_crop_matrix(size, rng, config.crop_scale) for _ in range(2)]
        stored = clip.flow_pair(t, gap)
        if config.confidence_px and stored.uncertainty_px is None:
            return Skip("flow without expected errors, which flowfeat.confidence_px weighs by")
        flow = square_flow(torch.from_numpy(np.ascontiguousarray(stored.flow_px)), config.crop)
        if not flow.isfinite().all():
            return Skip("teacher flow is not finite")
        if bool((flow.amax(dim=(1, 2)) == flow.amin(dim=(1, 2))).any()):
            return Skip("constant teacher flow")
        image = square_image(torch.from_numpy(np.ascontiguousarray(clip.frames([t])[0])), config.resize)
        sample = {"image": image, "flow": flow, "crop1": crops[0], "crop2": crops[1]}
        if config.confidence_px and stored.uncertainty_px is not None:
            sample["confidence"] = confidence(stored.uncertainty_px, config.confidence_px, config.crop)
        return sample

    def loss(self, module: nn.Module, batch: Batch) -> Loss:
        """Flow and edge loss of the trained decoder; samples without flow edges in their crop do not count."""
        images = normalise_images(batch["image"].float() / 255)
        losses = module(images, batch["flow"], batch["crop1"], batch["crop2"], batch.get("confidence"))
        metrics = {"flow_loss": losses.flow, "edge_loss": losses.edge}
        return Loss(losses.total, losses.valid.sum(), metrics)

    def after_step(self, module: nn.Module, step: int) -> None:
        """The averaged decoder follows."""
        assert isinstance(module, FlowFeatTraining)
        module.update_ema()

    def pictures(self, module: nn.Module, batch: Batch) -> dict[str, np.ndarray]:
        """Rows of input crop, teacher's flow, predicted flow, and main components of the features."""
        assert isinstance(module, FlowFeatTraining)
        part = {name: batch[name][:PICTURE_SAMPLES] for name in ("image", "flow", "crop1", "crop2")}
        images = normalise_images(part["image"].float() / 255)
        losses = module(images, part["flow"], part["crop1"], part["crop2"])
        crops = module.sample_crops(images, part["crop1"], part["crop2"])[len(images) :]
        _, features = module.student(ema=True)(crops)
        shown: list[np.ndarray] = []
        for i in range(len(images)):
            teacher = losses.teacher_flow[i]
            longest = float(teacher.norm(dim=0).max())
            shown += [
                image_picture(crops[i]),
                flow_picture(teacher, longest),
                flow_picture(losses.student_flow[i], longest),
                feature_pca(features[i]),
            ]
        return {"input_teacher_prediction_features": panel(shown, columns=4)}

    def published_model(self, tensors: Mapping[str, Tensor], ema: bool = True) -> FlowFeat:
        """The FlowFeat inside a checkpoint's tensors."""
        module = self._new_module()
        module.load_state_dict(tensors)
        return module.student(ema=ema)

    def export(self, model: nn.Module) -> ExportedModel:
        """A FlowFeat as the registry stores it."""
        assert isinstance(model, FlowFeat)
        licences = {"decoder": "Apache-2.0"}
        source = self.config.backbone_weights
        if source:
            known = source == "published" and model.backbone in LEDGER
            licences["encoder"] = LEDGER[model.backbone].licence if known else f"that of {Path(source).name}"
        return ExportedModel(
            architecture="flowfeat",
            config={"backbone": model.backbone, "image_size": list(model.encoder.image_size)},
            tensors=dict(model.state_dict()),
            inputs={"mean": IMAGENET_MEAN, "std": IMAGENET_STD},
            licences=licences,
        )

    def _new_module(self) -> FlowFeatTraining:
        config = self.config
        weights = (config.ridge_alpha, config.flow_weight, config.edge_weight, config.edge_sigma)
        constants = FlowFeatLossConfig(*weights, config.fit_with)
        size = (config.crop, config.crop)
        return FlowFeatTraining(self.backbone, constants, size, config.ema_decay, config.ema_every)

    def _load_start(self, module: FlowFeatTraining) -> None:
        source = self.config.backbone_weights
        if source:
            path = published_file(self.backbone) if source == "published" else source
            load_weights(module.encoder, path, self.backbone)
        if self.weights and Path(self.weights).is_dir():
            from kinema.pipelines.train.checkpoint import read_tensors, resolve_checkpoint

            module.load_state_dict(read_tensors(resolve_checkpoint(self.weights)))
        elif self.weights:
            load_weights(module.student(ema=False), self.weights, f"flowfeat/{self.config.variant}")
            module.decoder_ema.ema_model.load_state_dict(module.decoder.state_dict())


def square_image(image: Tensor, side: int) -> Tensor:
    """The centre square of an image uint8 [H, W, 3], resized with antialiasing: uint8 [3, side, side]."""
    height, width = image.shape[:2]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = image[top : top + short, left : left + short].permute(2, 0, 1)[None]
    return F.interpolate(square, (side, side), mode="bilinear", antialias=True)[0].contiguous()


def confidence(expected_error_px: np.ndarray, half_px: float, side: int) -> Tensor:
    """What pixels of the centre square count: 1 if certain, a half at an expected error of `half_px`; [1, s, s]."""
    error = torch.from_numpy(np.ascontiguousarray(expected_error_px)).float()
    height, width = error.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = 1 / (1 + (error[top : top + short, left : left + short] / half_px).square())
    return F.interpolate(square[None, None], (side, side), mode="bilinear", antialias=True)[0].contiguous()


def square_flow(flow_px: Tensor, side: int) -> Tensor:
    """The centre square of a flow field [2, H, W], resized with its values: float32 [2, side, side].

    The square is the image's (to half a pixel of the flow, where flow and image differ in size).
    """
    height, width = flow_px.shape[-2:]
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = crop_flow(flow_px.float(), top, left, short, short)
    return resize_flow(square, side, side).contiguous()
