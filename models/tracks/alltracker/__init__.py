"""AllTracker (Harley et al., arXiv:2506.07310)."""

from kinema.models.tracks.alltracker.network import AllTracker, DenseTracks, alltracker

__all__ = ["AllTracker", "DenseTracks", "alltracker"]
