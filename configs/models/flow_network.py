"""Settings of the flow networks' training."""

from __future__ import annotations

from dataclasses import dataclass, field

from kinema.configs.checks import require
from kinema.configs.models.flow_augmentation import FlowAugmentationConfig, Variant


@dataclass(frozen=True)
class FlowNetworkConfig:
    """Training of RAFT, SEA-RAFT (on stored flow) and SMURF (on frames alone)."""

    crop: tuple[int, int] = (368, 496)
    """Height and width of the training crops, in pixels of the stored flow."""
    gap: int = 1
    """Largest distance between the frames of a pair; all stored pairs up to it are drawn."""
    iters: int = 12
    """Refinements in training."""
    gamma: float = 0.8
    """Weight of a refinement relative to the next one (RAFT 0.8, SEA-RAFT 0.85)."""
    augment: Variant = "off"
    """off: flip and jitter below alone. dense: RAFT's augmentation. sparse: its variant for KITTI and HD1K."""
    augmentation: FlowAugmentationConfig = field(default_factory=FlowAugmentationConfig)
    """How far dense and sparse go."""
    flip: float = 0.5
    """Probability of a left-right flip, with augment=off."""
    jitter: float = 0.2
    """Largest relative change of brightness and contrast, with augment=off."""
    visible_only: bool = False
    """Learn only from pixels that the stored occlusion calls visible (for flow of another teacher)."""
    freeze_batch_norm: bool = True
    """Keep the statistics of batch norms, as the published fine-tuning stages do."""
    smoothness: float = 2.0
    """SMURF: weight of second-order smoothness."""
    edge_constant: float = 150.0
    """SMURF: how fast image edges weaken smoothness."""
    self_supervision: float = 0.0
    """SMURF: weight of the loss against its own flow of the uncropped images (published: 0.3, ramped in late)."""
    self_supervision_crop: int = 64
    """SMURF: pixels cut off each side for that."""

    def __post_init__(self) -> None:
        require(min(self.crop) >= 128, "flow_network.crop", list(self.crop), "use sides of 128 pixels or more")
        require(self.gap >= 1, "flow_network.gap", self.gap, "use 1 or more")
        require(self.iters >= 1, "flow_network.iters", self.iters, "use 1 or more")
        require(0 < self.gamma <= 1, "flow_network.gamma", self.gamma, "use 0 < gamma <= 1")
        require(0 <= self.flip <= 1, "flow_network.flip", self.flip, "use a probability, 0 to 1")
        require(0 <= self.jitter < 1, "flow_network.jitter", self.jitter, "use 0 <= jitter < 1")
        for name, least in (
            ("smoothness", 0),
            ("edge_constant", 0),
            ("self_supervision", 0),
            ("self_supervision_crop", 1),
        ):
            value = getattr(self, name)
            require(value >= least, f"flow_network.{name}", value, f"use {least} or more")
        if self.self_supervision:
            inner = min(self.crop) - 2 * self.self_supervision_crop
            rule = f"leaves {inner} pixels of the crop; it must leave 128"
            require(inner >= 128, "flow_network.self_supervision_crop", self.self_supervision_crop, rule)
