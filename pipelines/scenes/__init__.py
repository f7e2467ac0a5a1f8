"""Rendered scenes with exact flow, occlusion and tracks: the known answers of tests and of the demo."""

from kinema.pipelines.scenes.demo import load_scene, render_demo_videos, write_scene
from kinema.pipelines.scenes.scene import Scene

__all__ = ["Scene", "load_scene", "render_demo_videos", "write_scene"]
