"""Settings of `kinema embed`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kinema.configs.checks import require


@dataclass(frozen=True)
class EmbedConfig:
    """`kinema embed`: a registry model and clips/ in, features/ out."""

    model: str = "models:/kinema-flowfeat@champion"
    """Registry URI, run folder or checkpoint."""
    clips: str = ""
    """The clips artifact."""
    out: str = ""
    """Folder or URL of the features artifact."""
    features: Literal["y_dec", "y_enc", "pooled"] = "pooled"
    """Dense decoder or encoder maps, or their mean over the frame."""
    dtype: Literal["float16", "float32", "int8"] = "float16"
    """Type in which maps are stored (means are float32); int8 with a scale for each channel of a clip."""
    stride: int = 1
    """Every how many rows and columns of a map are stored."""
    frame_stride: int = 12
    """Every how many frames one is embedded."""
    short_side: int = 224
    """Frames are resized to this shorter side (rounded to the patch size)."""
    fps: float = 6.0
    """Motion embeddings: frames a second that the model is shown, best as many as in its training."""
    batch_frames: int = 8
    """Frames per network call."""
    num_actors: int = 0
    """Actors; 0 means one per GPU, or one per two CPUs without a GPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs."""
    allowed_quarantine: float = 0.05
    """Exit status 3 when more than this share of the clips was quarantined."""

    def __post_init__(self) -> None:
        require(self.frame_stride >= 1, "frame_stride", self.frame_stride, "use 1 or more")
        require(self.fps > 0, "fps", self.fps, "use a positive number of frames a second")
        require(self.stride >= 1, "stride", self.stride, "use 1 or more pixels")
        require(self.batch_frames >= 1, "batch_frames", self.batch_frames, "use 1 or more")
        require(self.short_side >= 16, "short_side", self.short_side, "use 16 or more pixels")
