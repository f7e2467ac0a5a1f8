"""DisMo as it is trained: motion extractor and frame generator together.

Source: Ressler-Antal et al., arXiv:2511.23428, section 3; the joint state dict has the published names.

Shape legend: B clips, T frames of the motion branch, P source/target pairs per clip, h w latent grid, c its channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kinema.models.backbones.rotary_layers import at_least_float32
from kinema.models.dismo.frame_generator import FrameGenerator
from kinema.models.dismo.motion_extractor import MotionExtractor


@dataclass(frozen=True)
class TrainingLoss:
    """What a training step gives."""

    loss: Float[Tensor, ""]
    """Mean over all pairs."""
    per_sample: Float[Tensor, "N"]
    """Loss of every pair, clip by clip."""
    motion: Float[Tensor, "B P d"]
    """Embeddings."""

    @property
    def motion_std_batch(self) -> Float[Tensor, ""]:
        """Spread of the embeddings over clips and channels, averaged over time."""
        return rearrange(at_least_float32(self.motion), "b p d -> p (b d)").std(dim=-1).mean()

    @property
    def motion_std_video(self) -> Float[Tensor, ""]:
        """Spread over channels, averaged."""
        return at_least_float32(self.motion).std(dim=-1).mean()


class DisMo(nn.Module):
    """Embeds a clip and asks that targets be made from sources and embeddings alone."""

    def __init__(self, motion_extractor_params: Mapping[str, Any], frame_generator_params: Mapping[str, Any]):
        super().__init__()
        self.motion_extractor = MotionExtractor(**motion_extractor_params)
        self.frame_generator = FrameGenerator(**frame_generator_params)

    def forward(
        self,
        motion_frames: Float[Tensor, "B T H W 3"],
        source_frames: Float[Tensor, "B P y x 3"],
        target_latents: Float[Tensor, "N h w c"],
        delta_times: Float[Tensor, "B P"],
        noise: Float[Tensor, "N h w c"] | None = None,
        t: Float[Tensor, "N"] | None = None,
    ) -> TrainingLoss:
        """Loss of all pairs; source i is frame i of the motion branch, so there are T - max_delta_time pairs a clip.

        Args: noise and its share t are drawn where they are not given, as in `FrameGenerator.loss`.
        """
        motion = self.motion_extractor(motion_frames)
        per_sample = self.frame_generator.loss(
            target_latents,
            rearrange(source_frames, "b p h w c -> (b p) h w c"),
            rearrange(motion, "b p d -> (b p) d"),
            rearrange(delta_times, "b p -> (b p)"),
            noise,
            t,
        )
        return TrainingLoss(per_sample.mean(), per_sample, motion)
