"""Optical flow benchmarks."""
