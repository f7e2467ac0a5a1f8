"""Settings of DinoFlow's training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from kinema.configs.checks import require
from kinema.configs.models.flow_augmentation import FlowAugmentationConfig, Variant


@dataclass(frozen=True)
class DinoFlowConfig:
    """DinoFlow and what it learns from (model card of blanchon/dinoflow-model)."""

    backbone: str = "vits16"
    """Vision transformer: vits16 (DINOv3 ViT-S/16), dinov2_vits14, ..., or nano_vit8. Or nano_conv4, convolutions
    that learn from scratch on a CPU."""
    backbone_weights: str = field(default="", metadata={"file": True})
    """Checkpoint of the encoder: file, URL, `published` (ledger) or empty (untrained, said aloud)."""
    freeze_encoder: bool = True
    """Train the head alone; false trains the encoder too, which an untrained one needs."""
    width: int = 256
    """Fusion width of the head, a multiple of 4."""
    reading: Literal["A", "B"] = "B"
    """Front end of the head: A sees features, correlations and difference, B all but the features."""
    crop: tuple[int, int] = (512, 512)
    """Height and width of the training crops, in pixels of the stored flow."""
    gap: int = 1
    """Largest distance between the frames of a pair; all stored pairs up to it are drawn."""
    max_motion_px: float = 400.0
    """Pixels that move this far or farther do not count."""
    matching: float = 0.0
    """Weight of a second loss, by which each patch's correlations have to point to its true motion: an encoder that
    learns from scratch needs it (1 serves), a trained one does not. 0: none, as published."""
    visible_only: bool = False
    """Learn only from pixels that the stored occlusion calls visible (for flow of another teacher)."""
    augment: Variant = "dense"
    """off: random crops alone. dense: RAFT's augmentation. sparse: its variant for KITTI and HD1K."""
    augmentation: FlowAugmentationConfig = field(default_factory=FlowAugmentationConfig)
    """How far dense and sparse go."""

    def __post_init__(self) -> None:
        require(min(self.crop) >= 16, "dinoflow.crop", list(self.crop), "use sides of 16 pixels or more")
        require(self.gap >= 1, "dinoflow.gap", self.gap, "use 1 or more")
        require(self.matching >= 0, "dinoflow.matching", self.matching, "use a positive weight, or 0 for none")
        require(self.max_motion_px > 0, "dinoflow.max_motion_px", self.max_motion_px, "use a positive number")
        rule = "use a positive multiple of 4"
        require(self.width >= 4 and self.width % 4 == 0, "dinoflow.width", self.width, rule)
