"""Optical flow networks, and the geometry of flow that all of them share."""
