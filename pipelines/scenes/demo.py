"""Rendered scenes as video files, and the way back from such a file to its exact motion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from jaxtyping import Bool, Float32

from kinema.configs.json_text import json_text
from kinema.pipelines.scenes.scene import Camera, Scene

_TAG = "kinema scene "
_FILMS: dict[str, Camera] = {"pan.mp4": "pan", "cuts.mp4": "mixed", "zoom_and_turn.mp4": "mixed"}


def render_demo_videos(
    folder: str | Path,
    height: int = 256,
    width: int = 320,
    num_frames: int = 72,
    seed: int = 0,
    num_shots: tuple[int, int, int] = (1, 3, 1),
) -> list[Path]:
    """Write three short films as mp4: a pan, one with cuts between its shots, and a zoom with turns.

    Args: num_shots, shots of equal length in each film; more shots show more objects and motions.
    Existing files of these names are replaced. Returns the three paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, (name, camera) in enumerate(_FILMS.items()):
        shots = num_shots[number]
        cuts = tuple(sorted({shot * num_frames // shots for shot in range(1, shots)} - {0}))
        scene = Scene(3 * seed + number, height, width, num_frames, cuts=cuts, camera=camera)
        write_scene(scene, folder / name)
        paths.append(folder / name)
    return paths


def write_scene(scene: Scene, path: str | Path, crf: int = 10) -> None:
    """Encode a scene as H.264; its arguments go into the file's comment, for `load_scene`."""
    even = (scene.height % 2, scene.width % 2) == (0, 0)
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = _TAG + json_text(_arguments(scene), sort_keys=True)
        stream = container.add_stream("libx264", rate=Fraction(scene.fps).limit_denominator(1001))
        stream.width, stream.height = scene.width, scene.height
        # Chroma at half resolution needs even sides.
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        stream.options = {"crf": str(crf), "preset": "veryfast", "x264-params": "mbtree=0"}  # see video/encode.py
        stream.codec_context.thread_count = 1
        for image in scene.frames():
            # Converted here: the encoder's own conversion of RGB frames does not give the same bytes every time.
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def load_scene(path: str | Path) -> Scene:
    """The scene that a video written by `write_scene` shows; frame numbers of both agree.

    Raises: ValueError when the video is not a rendered scene.
    """
    with av.open(str(path)) as container:
        comment = container.metadata.get("comment", "")
    if not comment.startswith(_TAG):
        raise ValueError(f"{path} is not a rendered scene: its comment does not begin with {_TAG!r}")
    arguments = json.loads(comment[len(_TAG) :])
    return Scene(**{**arguments, "cuts": tuple(arguments["cuts"])})


@dataclass(frozen=True)
class ClipTruth:
    """Exact motion of a clip that was cut from a rendered video."""

    scene: Scene
    frames: tuple[int, ...]
    """The scene's frame that each frame of the clip shows."""
    size: tuple[int, int]
    """(height, width) of the clip."""

    def motion(
        self, t: int, gap: int, size: tuple[int, int] | None = None
    ) -> tuple[Float32[np.ndarray, "2 H W"], Bool[np.ndarray, "H W"]]:
        """Flow from the clip's frame t to its frame t + gap, and where it is occluded.

        Args: size, (height, width) at which flow is wanted, in its pixels; None: the clip's.
        """
        return self.scene.motion(self.frames[t], self.frames[t + gap], size or self.size)


def clip_truth(videos: str | Path, meta: Mapping[str, Any]) -> ClipTruth:
    """Ground truth of a clip.

    Args: videos, the folder that was sharded; meta, the clip's json (`Clip.meta`).
    Raises: ValueError when the clip's source is not a rendered scene.
    """
    scene = load_scene(Path(videos) / meta["source"])
    time_base = Fraction(*meta["time_base"])
    frames = tuple(scene.frame_at(float(pts * time_base)) for pts in meta["pts"])
    return ClipTruth(scene, frames, (meta["height"], meta["width"]))


def _arguments(scene: Scene) -> dict[str, object]:
    names = ("seed", "height", "width", "num_frames", "fps", "num_objects", "cuts", "camera", "speed_px")
    return {name: getattr(scene, name) for name in names}
