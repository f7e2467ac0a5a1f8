"""CoTracker3 offline (Karaev et al., arXiv:2410.11831): the network, and predictors around it."""

from kinema.models.tracks.cotracker3.network import CoTracker3, PointTracks, cotracker3
from kinema.models.tracks.cotracker3.predictor import BenchmarkTracker, CoTracker3Predictor

__all__ = ["BenchmarkTracker", "CoTracker3", "CoTracker3Predictor", "PointTracks", "cotracker3"]
