"""Evaluation: DAVIS for features; Sintel, KITTI, Middlebury for flow; TAP-Vid for tracks; pokes and parts for FPT."""
