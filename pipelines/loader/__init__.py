"""Training samples from clips and their sidecars: which, in what order, and only the bytes they need."""

from kinema.pipelines.loader.clip import Clip, DamagedClip
from kinema.pipelines.loader.index import ClipIndex
from kinema.pipelines.loader.loader import Loader
from kinema.pipelines.loader.reader import Skip
from kinema.pipelines.sidecars.tracks_codec import Tracks

__all__ = ["Clip", "ClipIndex", "DamagedClip", "Loader", "Skip", "Tracks"]
