"""Evaluation: DAVIS for features; Sintel, KITTI and Middlebury for flow networks."""
