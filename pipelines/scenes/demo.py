"""Rendered scenes as video files, and the way back from such a file to its exact motion."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av

from kinema.pipelines.scenes.scene import Scene

_TAG = "kinema scene "


def render_demo_videos(
    folder: str | Path, height: int = 256, width: int = 320, num_frames: int = 72, seed: int = 0
) -> list[Path]:
    """Write three short films as mp4: a pan, three shots with cuts between them, and a zoom with turns.

    Existing files of these names are replaced. Returns the three paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    size = {"height": height, "width": width, "num_frames": num_frames}
    cuts = tuple(sorted({num_frames // 3, 2 * num_frames // 3} - {0}))
    scenes = {
        "pan.mp4": Scene(seed=3 * seed, camera="pan", **size),
        "three_shots.mp4": Scene(seed=3 * seed + 1, camera="mixed", cuts=cuts, **size),
        "zoom_and_turn.mp4": Scene(seed=3 * seed + 2, camera="mixed", num_objects=2, **size),
    }
    for name, scene in scenes.items():
        write_scene(scene, folder / name)
    return [folder / name for name in scenes]


def write_scene(scene: Scene, path: str | Path, crf: int = 10) -> None:
    """Encode a scene as H.264; its arguments go into the file's comment, for `load_scene`."""
    even = (scene.height % 2, scene.width % 2) == (0, 0)
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = _TAG + json.dumps(_arguments(scene), sort_keys=True)
        stream = container.add_stream("libx264", rate=Fraction(scene.fps).limit_denominator(1001))
        stream.width, stream.height = scene.width, scene.height
        # Chroma at half resolution needs even sides.
        stream.pix_fmt = "yuv420p" if even else "yuv444p"
        stream.options = {"crf": str(crf), "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        for image in scene.frames():
            # Converted here: the encoder's own conversion of RGB frames does not give the same bytes every time.
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=stream.pix_fmt)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def load_scene(path: str | Path) -> Scene:
    """The scene that a video written by `write_scene` shows; frame numbers of both agree.

    A clip cut from the video knows its source file and the presentation time of each of its frames:
    `scene.frame_at(pts * time_base)` is the frame to ask ground truth for, at the clip's size if it was resized.

    Raises: ValueError when the video is not a rendered scene.
    """
    with av.open(str(path)) as container:
        comment = container.metadata.get("comment", "")
    if not comment.startswith(_TAG):
        raise ValueError(f"{path} is not a rendered scene: its comment does not begin with {_TAG!r}")
    arguments = json.loads(comment[len(_TAG) :])
    return Scene(**{**arguments, "cuts": tuple(arguments["cuts"])})


def _arguments(scene: Scene) -> dict[str, object]:
    names = ("seed", "height", "width", "num_frames", "fps", "num_objects", "cuts", "camera", "speed_px")
    return {name: getattr(scene, name) for name in names}
