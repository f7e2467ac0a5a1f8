"""`python -m kinema.pipelines.bench.presets FOLDER [FRAMES]`: what x264's presets cost and give on real videos.

For each file of the folder: bytes, PSNR and SSIM of luma and processor time of the stage's own encode (crf 18, groups
of 12), each against `medium`. The default is the fastest preset that keeps within 2 % of medium's bytes and 0.1 dB of
its PSNR on every file.
"""

from __future__ import annotations

import io
import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from jaxtyping import Float64, UInt8

from kinema.configs import ClipConfig
from kinema.pipelines.video.decode import VideoFile
from kinema.pipelines.video.encode import ClipEncoder
from kinema.pipelines.video.errors import SourceError
from kinema.pipelines.video.look import look_of
from kinema.pipelines.video.picture import PictureMaker, picture_spec, plane_arrays

PRESETS = ("superfast", "veryfast", "faster", "fast", "medium", "slow")
MOST_BYTES, MOST_LOSS_DB = 1.02, 0.1


@dataclass(frozen=True)
class Encoded:
    """One file with one preset."""

    num_bytes: int
    psnr_db: float
    """Of luma, over all frames."""
    ssim: float
    """Of luma, mean over frames."""
    cpu_s: float


def measure(path: Path, num_frames: int, presets: Sequence[str] = PRESETS) -> dict[str, Encoded]:
    """Each preset on the first frames of a file. Raises: SourceError for a file without frames."""
    with VideoFile(str(path)) as video:
        frames = list(itertools.islice(video.frames(), num_frames))
        fps = video.rates[0] if video.rates else Fraction(25)
    spec = picture_spec(frames[0], look_of(frames[0]).orientation, "h264", 0)
    maker = PictureMaker(spec)
    pictures = [maker.make(frame) for frame in frames]
    lumas = [plane_arrays(picture)[0].copy() for picture in pictures]
    found = {}
    for preset in presets:
        used = time.process_time()
        with ClipEncoder(ClipConfig(preset=preset), spec, fps) as encoder:
            for picture in pictures:
                encoder.add(picture)
            mp4 = encoder.finish()
        used = time.process_time() - used
        with av.open(io.BytesIO(mp4), "r") as container:
            shown = [plane_arrays(frame)[0] for frame in container.decode(video=0)]
        errors = [np.square(a.astype(np.float64) - b).mean() for a, b in zip(lumas, shown, strict=True)]
        psnr = 10 * np.log10(255**2 / max(1e-9, float(np.mean(errors))))
        similar = float(np.mean([ssim(a, b) for a, b in zip(lumas, shown, strict=True)]))
        found[preset] = Encoded(len(mp4), float(psnr), similar, used)
    return found


def ssim(a: UInt8[np.ndarray, "H W"], b: UInt8[np.ndarray, "H W"]) -> float:
    """Structural similarity: Wang et al., IEEE TIP 13(4), 2004, with a Gaussian window of 11 pixels and sigma 1.5."""

    def mean(values: Float64[np.ndarray, "H W"]) -> Float64[np.ndarray, "H W"]:
        return cv2.GaussianBlur(values, (11, 11), 1.5)

    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, both = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return float(similar.mean())


def best(files: dict[str, dict[str, Encoded]]) -> str:
    """The preset that the rule chooses."""
    allowed = [
        preset
        for preset in PRESETS
        if all(
            own[preset].num_bytes <= MOST_BYTES * own["medium"].num_bytes
            and own[preset].psnr_db >= own["medium"].psnr_db - MOST_LOSS_DB
            for own in files.values()
        )
    ]
    return min(allowed, key=lambda preset: sum(own[preset].cpu_s for own in files.values()))


def main(folder: str, num_frames: int = 24) -> None:
    """Print the table in Markdown, and the preset that the rule chooses."""
    files: dict[str, dict[str, Encoded]] = {}
    print(f"| file | medium | {' | '.join(preset for preset in PRESETS if preset != 'medium')} |")
    print(f"|{'---|' * (len(PRESETS) + 1)}")
    for path in sorted(Path(folder).iterdir()):
        try:
            own = files[path.name] = measure(path, num_frames)
        except (SourceError, av.FFmpegError, IndexError) as error:
            print(f"{path.name}: {error}", file=sys.stderr)
            continue
        base = own["medium"]
        cells = [f"{base.num_bytes} B, {base.psnr_db:.2f} dB, {base.ssim:.4f}, {base.cpu_s:.2f} s"]
        for preset in PRESETS:
            if preset != "medium":
                e = own[preset]
                change = f"{e.psnr_db - base.psnr_db:+.2f}, {e.ssim - base.ssim:+.4f}"
                cells.append(f"{e.num_bytes / base.num_bytes:.2f}, {change}, {e.cpu_s / base.cpu_s:.2f}")
        print(f"| {path.name} | {' | '.join(cells)} |", flush=True)
    print(f"chosen: {best(files)}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 24)
