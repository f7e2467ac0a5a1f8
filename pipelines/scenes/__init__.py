"""Rendered scenes with exact flow, occlusion and tracks: the known answers of tests and of the demo."""

from kinema.pipelines.scenes.demo import ClipTruth, clip_truth, load_scene, render_demo_videos, write_scene
from kinema.pipelines.scenes.scene import Scene

__all__ = ["ClipTruth", "Scene", "clip_truth", "load_scene", "render_demo_videos", "write_scene"]
