"""DisMo: motion embeddings apart from appearance, and the frame generator they are trained with."""

from kinema.models.dismo.frame_generator import FrameGenerator
from kinema.models.dismo.model import DisMo
from kinema.models.dismo.motion_extractor import MotionExtractor

__all__ = ["DisMo", "FrameGenerator", "MotionExtractor"]
